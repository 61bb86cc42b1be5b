"""Both stages on a tiny base: the loss goes down, nothing but the patch moves, and an interruption leaves no trace."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from policypatch.data.datamodule import PairData
from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone, plain_logits
from policypatch.model.tree import Item
from policypatch.train.dpo_module import DPOModule, PreferenceSettings
from policypatch.train.module import Optimisation, StageModule
from policypatch.train.reference import reference_logprobs
from policypatch.train.sft_module import SFTModule
from policypatch.train.stage import run_stage

PATCH = 4


def pairs(count: int = 12) -> list[Item]:
    """Prompts of different lengths that begin alike; chosen and rejected draw on different tokens."""
    generator = torch.Generator().manual_seed(5)

    def tokens(low: int, high: int, most: int) -> tuple[int, ...]:
        length = int(torch.randint(2, most, (1,), generator=generator))
        return tuple(torch.randint(low, high, (length,), generator=generator).tolist())

    return [Item((9, *tokens(10, 290, 7)), (tokens(20, 40, 9), tokens(60, 80, 9))) for _ in range(count)]


@pytest.fixture
def backbone(tiny_base) -> PrefixBackbone:
    generator = torch.Generator().manual_seed(1)
    scale = tiny_base.embedding.std()
    return PrefixBackbone(tiny_base.model, torch.randn(PATCH, tiny_base.width, generator=generator) * scale, 64)


def optimisation(steps: int, lr: float = 0.02) -> Optimisation:
    return Optimisation(steps, lr, warmup=0.1)


class Recorded:
    """What a module saw, and where it is to break off."""

    def __init__(self, *args: object, stop_at: int | None = None, with_: type[BaseException] = RuntimeError):
        super().__init__(*args)
        self.seen: list[tuple[int, ...]] = []
        self.figures: list[float] = []
        self.stop_at, self.error = stop_at, with_

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop_at:
            raise self.error("broken off")
        self.seen.append(batch.pairs)
        loss = super().training_step(batch, batch_idx)
        self.figures.append(loss.item())
        return loss


class RecordedSFT(Recorded, SFTModule):
    pass


class RecordedDPO(Recorded, DPOModule):
    pass


def fit(module: StageModule, data: PairData, folder: Path, every: int = 4, clip: float = 1.0) -> int:
    folder.mkdir(exist_ok=True)
    stage = OmegaConf.create({"steps": data.steps, "clip": clip})
    trainer = OmegaConf.create({"accelerator": "cpu", "devices": 1, "checkpoint_every": every, "validate_every": 3})
    return run_stage(module, data, stage, trainer, folder, [])


def sft(backbone: PrefixBackbone, folder: Path, steps: int = 30, held_out: float = 0.0, **options) -> RecordedSFT:
    module = RecordedSFT(backbone, optimisation(steps, 0.05), **options)
    fit(module, PairData(pairs(), 4, steps, 3, 1, backbone.tree, None, held_out), folder)
    return module


def dpo(backbone: PrefixBackbone, base, folder: Path, steps: int = 30, held_out: float = 0.0, **options) -> RecordedDPO:
    reference = reference_logprobs(base, backbone.patch.detach().clone(), pairs(), 64)
    module = RecordedDPO(backbone, optimisation(steps), PreferenceSettings(0.5, 0.1, 0.1), **options)
    fit(module, PairData(pairs(), 4, steps, 3, 2, backbone.tree, reference, held_out), folder)
    return module


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_lowers_its_loss_and_moves_the_patch_alone(stage: str, backbone, tiny_base, tmp_path):
    frozen = {name: tensor.clone() for name, tensor in tiny_base.model.state_dict().items()}
    before = backbone.patch.detach().clone()
    reference = reference_logprobs(tiny_base, before, pairs(), 64)
    everything = PairData(pairs(), 12, 1, 0, 1 if stage == "sft" else 2, backbone.tree, reference).batch(range(12))
    start = PrefixBackbone(tiny_base.model, before, 64)
    module = sft(backbone, tmp_path) if stage == "sft" else dpo(backbone, tiny_base, tmp_path)
    with torch.no_grad():
        loss_after = module.losses(everything)["loss"].item()
        module.backbone = start
        loss_before = module.losses(everything)["loss"].item()
    assert loss_after < 0.9 * loss_before
    assert not torch.equal(backbone.patch, before)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tiny_base.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in tiny_base.model.parameters())
    assert not tiny_base.model.training


def test_dpo_learns_to_prefer_the_chosen_side(backbone, tiny_base, tmp_path):
    dpo(backbone, tiny_base, tmp_path)
    first, last = (
        {r["metric"]: float(r["value"]) for r in rows(tmp_path) if r["step"] == step} for step in ("1", "30")
    )
    # At the first step the policy is its own reference: every margin is 0 up to rounding.
    assert first["train/margin"] == pytest.approx(0, abs=1e-4)
    assert first["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert last["train/margin"] > 0.5
    assert last["train/accuracy"] == 1.0


def test_the_optimiser_holds_the_patch_alone(backbone):
    module = SFTModule(backbone, Optimisation(10, 0.01, weight_decay=0.03, betas=(0.8, 0.9)))
    configured = module.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    assert [id(p) for p in group["params"]] == [id(backbone.patch)]
    assert type(configured["optimizer"]) is torch.optim.AdamW
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (0.01, 0.03, (0.8, 0.9))
    assert configured["lr_scheduler"]["interval"] == "step"


def plain(backbone: PrefixBackbone, item: Item, completion: Sequence[int], patch: torch.Tensor) -> torch.Tensor:
    """(tokens, V) log-probabilities by plain concatenation."""
    return plain_logits(backbone.model, patch, [*item.prompt], [*completion]).log_softmax(-1)


@pytest.mark.parametrize("nll_weight", [0.0, 0.7])
@pytest.mark.parametrize("kl_weight", [0.0, 0.4])
def test_dpo_loss_is_the_sum_of_its_parts(nll_weight: float, kl_weight: float, backbone):
    """Held against plain concatenation: sums for the preference, means per token of the chosen side for the anchors."""
    data = PairData(pairs(), 5, 1, 0, 2, backbone.tree, -10 * torch.rand(12, 2))
    batch = data.batch([0, 3, 5, 7, 8])
    preference = PreferenceSettings(0.3, nll_weight, kl_weight, 0.1)
    with torch.no_grad():
        figures = DPOModule(backbone, optimisation(1), preference).losses(batch)
        losses, nlls, kls = [], [], []
        for row, i in enumerate(batch.pairs):
            item = data.items[i]
            ours, base = (
                [plain(backbone, item, c, patch) for c in item.completions]
                for patch in (backbone.patch, backbone.patch[:0])
            )
            sums = [o.gather(1, torch.tensor(c)[:, None]).sum() for o, c in zip(ours, item.completions, strict=True)]
            margin = 0.3 * ((sums[0] - batch.reference[row, 0]) - (sums[1] - batch.reference[row, 1]))
            losses.append(0.9 * torch.log1p(torch.exp(-margin)) + 0.1 * torch.log1p(torch.exp(margin)))
            nlls.append(-sums[0] / len(item.completions[0]))
            kls.append((base[0].exp() * (base[0] - ours[0])).sum(-1).mean())
    preference_loss, nll, kl = (torch.stack(values).mean() for values in (losses, nlls, kls))
    torch.testing.assert_close(figures["preference_loss"], preference_loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(figures["nll_chosen"], nll, rtol=1e-4, atol=1e-4)
    assert ("kl_base" in figures) == (kl_weight > 0)
    if kl_weight:
        torch.testing.assert_close(figures["kl_base"], kl, rtol=1e-4, atol=1e-4)
    expected = preference_loss + nll_weight * nll + kl_weight * kl
    torch.testing.assert_close(figures["loss"], expected, rtol=1e-4, atol=1e-4)


def test_sft_loss_is_the_mean_nll_per_token_of_the_chosen_side(backbone):
    data = PairData(pairs(), 3, 1, 0, 1, backbone.tree)
    with torch.no_grad():
        loss = SFTModule(backbone, optimisation(1)).losses(data.batch([1, 4, 6]))["loss"]
        nlls = []
        for i in (1, 4, 6):
            item = data.items[i]
            table = plain(backbone, item, item.completions[0], backbone.patch)
            nlls.append(-table.gather(1, torch.tensor(item.completions[0])[:, None]).mean())
    torch.testing.assert_close(loss, torch.stack(nlls).mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_one_batch_of_8_is_8_batches_of_1(stage: str, backbone):
    """Loss and gradient: nothing is normalised by what else is in the batch."""
    reference = -10 * torch.rand(12, 2, generator=torch.Generator().manual_seed(2))
    module = (
        SFTModule(backbone, optimisation(1))
        if stage == "sft"
        else DPOModule(backbone, optimisation(1), PreferenceSettings(0.2, 0.3, 0.3, 0.1))
    )
    data = PairData(pairs(), 8, 1, 0, 1 if stage == "sft" else 2, backbone.tree, reference)

    def mean_over(batches: list[list[int]]) -> tuple[float, torch.Tensor]:
        backbone.patch.grad = None
        losses = [module.losses(data.batch(batch))["loss"] for batch in batches]
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.item(), backbone.patch.grad.clone()

    whole, whole_gradient = mean_over([[*range(8)]])
    split, split_gradient = mean_over([[i] for i in range(8)])
    assert split == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(split_gradient, whole_gradient, rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_in_a_sentence(backbone, tmp_path):
    with torch.no_grad():
        backbone.patch[0, 0] = math.nan
    with pytest.raises(PolicyPatchError, match=r"sft loss became nan at step 0: lower sft.lr \(now 0.05\)") as caught:
        sft(backbone, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("beta", [0, -0.1])
def test_beta_must_be_positive(backbone, beta: float):
    with pytest.raises(PolicyPatchError, match=r"dpo\.beta"):
        DPOModule(backbone, optimisation(1), PreferenceSettings(beta))


def test_an_unknown_decay_is_refused(backbone):
    with pytest.raises(PolicyPatchError, match=r"sft\.decay is 'sometimes'"):
        SFTModule(backbone, Optimisation(1, 0.1, decay="sometimes"))


def test_dpo_without_a_reference_is_refused(backbone):
    batch = PairData(pairs(), 2, 1, 0, 2, backbone.tree).batch([0, 1])
    with pytest.raises(PolicyPatchError, match="reference"):
        DPOModule(backbone, optimisation(1), PreferenceSettings(0.1)).losses(batch)


def test_a_checkpoint_holds_the_trainable_tensors_alone(backbone, tiny_base, tmp_path):
    dpo(backbone, tiny_base, tmp_path, steps=5)
    (path,) = tmp_path.rglob("*.ckpt")
    assert path == tmp_path / "checkpoints" / "dpo" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {"backbone.patch"}
    assert torch.equal(checkpoint["state_dict"]["backbone.patch"], backbone.patch)
    (optimiser,) = checkpoint["optimizer_states"]
    assert sum(v.numel() for v in optimiser["state"][0].values()) == 2 * backbone.patch.numel() + 1
    assert path.stat().st_size < 16_000 + 3 * 4 * backbone.patch.numel()


def test_the_log_has_a_row_for_each_step_and_the_held_out_figures(backbone, tmp_path):
    sft(backbone, tmp_path, steps=6, held_out=0.25)
    ours = [(r["stage"], r["step"], r["metric"]) for r in rows(tmp_path)]
    trained = [("sft", str(step), "train/loss") for step in range(1, 7)]
    held_out = [("sft", step, "val/loss") for step in ("3", "6")]  # validate_every is 3
    assert [row for row in ours if row[2] == "train/loss"] == trained
    assert [row for row in ours if row[2] == "val/loss"] == held_out
    assert len(ours) == len(trained) + len(held_out)


def train(stage: str, base, folder: Path, steps: int, **options) -> tuple[torch.Tensor, Recorded]:
    """A whole stage from a fresh backbone, as a restarted process would."""
    generator = torch.Generator().manual_seed(1)
    fresh = PrefixBackbone(base.model, torch.randn(PATCH, base.width, generator=generator), 64)
    if stage == "sft":
        return fresh.patch.detach(), sft(fresh, folder, steps, 0.2, **options)
    return fresh.patch.detach(), dpo(fresh, base, folder, steps, 0.2, **options)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("stage", "stops"),
    [
        ("sft", [6]),  # in the middle of a pass over the pairs, between two checkpoints
        ("dpo", [2]),  # before the first checkpoint
        ("dpo", [4]),  # straight after a checkpoint
        ("dpo", [5, 9, 10]),  # again and again
    ],
)
def test_an_interrupted_stage_comes_to_the_same_numbers(stage, stops, error, tiny_base, tmp_path):
    steps = 11
    expected, undisturbed = train(stage, tiny_base, tmp_path / "a", steps)
    for stop in stops:
        with pytest.raises((error, SystemExit)):
            train(stage, tiny_base, tmp_path / "b", steps, stop_at=stop, with_=error)
        assert len(rows(tmp_path / "b")) < len(rows(tmp_path / "a"))
    patch, resumed = train(stage, tiny_base, tmp_path / "b", steps)
    done = stops[-1] // 4 * 4  # the last checkpoint
    assert resumed.seen == undisturbed.seen[done:]
    assert resumed.figures == undisturbed.figures[done:]
    assert torch.equal(patch, expected)
    assert (tmp_path / "b" / "metrics.csv").read_text() == (tmp_path / "a" / "metrics.csv").read_text()


@pytest.mark.parametrize("steps", [8, 9])  # at a checkpoint and past one
def test_a_finished_stage_is_not_trained_again(steps: int, tiny_base, tmp_path):
    expected, _ = train("sft", tiny_base, tmp_path, steps)
    log = (tmp_path / "metrics.csv").read_text()
    patch, again = train("sft", tiny_base, tmp_path, steps)
    assert again.seen == []
    assert torch.equal(patch, expected)
    assert (tmp_path / "metrics.csv").read_text() == log


def test_a_line_that_a_killed_run_left_half_written_is_dropped(tiny_base, tmp_path):
    train("sft", tiny_base, tmp_path / "a", 6)
    with pytest.raises(RuntimeError):
        train("sft", tiny_base, tmp_path / "b", 6, stop_at=5)
    with (tmp_path / "b" / "metrics.csv").open("a") as f:
        f.write("sft,1")
    train("sft", tiny_base, tmp_path / "b", 6)
    assert (tmp_path / "b" / "metrics.csv").read_text() == (tmp_path / "a" / "metrics.csv").read_text()


def test_the_second_stage_keeps_the_rows_of_the_first(tiny_base, tmp_path):
    train("sft", tiny_base, tmp_path, 5)
    first = (tmp_path / "metrics.csv").read_text()
    with pytest.raises(RuntimeError):
        train("dpo", tiny_base, tmp_path, 6, stop_at=5)
    train("dpo", tiny_base, tmp_path, 6)
    text = (tmp_path / "metrics.csv").read_text()
    assert text.startswith(first)
    assert [r["step"] for r in rows(tmp_path) if (r["stage"], r["metric"]) == ("dpo", "train/loss")] == list("123456")


def test_reference_logprobs_are_plain_sums_kept_for_the_next_run(backbone, tiny_base):
    from policypatch.files.cache import counters, reset_counters

    reset_counters()
    found = reference_logprobs(tiny_base, backbone.patch.detach(), pairs(), 64)
    assert found.shape == (12, 2)
    for i, item in enumerate(pairs()):
        for side, completion in enumerate(item.completions):
            with torch.no_grad():
                table = plain(backbone, item, completion, backbone.patch)
            expected = table.gather(1, torch.tensor(completion)[:, None]).sum()
            torch.testing.assert_close(found[i, side], expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(reference_logprobs(tiny_base, backbone.patch.detach(), pairs(), 64), found)
    assert counters()["reference"] == {"hits": 1, "misses": 1}
    reference_logprobs(tiny_base, backbone.patch.detach()[:0], pairs(), 64)
    assert counters()["reference"] == {"hits": 1, "misses": 2}
