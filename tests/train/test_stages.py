"""Both stages on a tiny base: the loss goes down, nothing but the patch moves, and an interruption leaves no trace."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from policypatch.data.datamodule import Example, PairData
from policypatch.errors import PolicyPatchError
from policypatch.model import head
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.logprobs import item_logprobs
from policypatch.train.dpo_module import DPOModule, PreferenceSettings
from policypatch.train.module import Optimisation
from policypatch.train.pair_stage import Weights
from policypatch.train.sft_module import SFTModule


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


Train = Callable[..., Recorded]


@pytest.fixture
def train(fit, new_backbone, tiny_base, rows) -> Train:
    """train(stage, folder, ...) -> the module after a whole stage from a fresh patch, as a restarted process would."""

    def run(
        stage: str,
        folder: Path,
        steps: int = 30,
        examples: list[Example] = rows,
        held_out: float = 0.0,
        kl_weight: float = 0.0,
        start: torch.Tensor | None = None,
        trainer: dict[str, object] | None = None,
        **options,
    ) -> Recorded:
        backbone = new_backbone() if start is None else PrefixBackbone(tiny_base.model, start, 64)
        recorded = {key: options.pop(key) for key in ("stop_at", "with_") if key in options}
        reference = None
        if stage == "sft":
            module: Recorded = RecordedSFT(backbone, optimisation(steps, 0.05), Weights(kl_weight), **recorded)
        else:
            reference = item_logprobs(tiny_base, backbone.patch.detach().clone(), [e.item for e in examples], 64)
            module = RecordedDPO(
                backbone, optimisation(steps), PreferenceSettings(0.5, 0.1, 0.1), Weights(kl_weight), **recorded
            )
        completions = 1 if stage == "sft" else 2
        data = PairData(examples, 4, steps, 3, completions, backbone.tree, reference, held_out, **options)
        fit(module, data, folder, **(trainer or {}))
        return module

    return run


def log_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as f:
        return list(csv.DictReader(f))


def patch_of(module: Recorded) -> torch.Tensor:
    return module.backbone.patch.detach()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_lowers_its_loss_and_moves_the_patch_alone(stage: str, train, new_backbone, tiny_base, rows, tmp_path):
    frozen = {name: tensor.clone() for name, tensor in tiny_base.model.state_dict().items()}
    start = new_backbone()
    before = start.patch.detach().clone()
    reference = item_logprobs(tiny_base, before, [e.item for e in rows], 64)
    everything = PairData(rows, 12, 1, 0, 1 if stage == "sft" else 2, start.tree, reference).batch(range(12))
    module = train(stage, tmp_path)
    moved = patch_of(module)
    with torch.no_grad():
        loss_after = module.losses(everything)["loss"].value.item()
        module.backbone = start
        loss_before = module.losses(everything)["loss"].value.item()
    assert loss_after < 0.9 * loss_before
    assert not torch.equal(moved, before)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tiny_base.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in tiny_base.model.parameters())
    assert not tiny_base.model.training


def test_the_head_is_read_in_blocks_of_the_size_that_is_asked_for(train, monkeypatch, mixed, tmp_path):
    sizes, whole = set(), head._blocks

    def blocks(model, states, at_once):
        for weight, logits in whole(model, states, at_once):
            sizes.add(len(weight))
            yield weight, logits

    monkeypatch.setattr(head, "_blocks", blocks)
    monkeypatch.setattr(head, "LEAST", 8)
    module = train("sft", tmp_path / "whole", steps=3, examples=mixed, kl_weight=0.5)
    (vocabulary,) = sizes
    sizes.clear()
    other = train("sft", tmp_path / "blocks", steps=3, examples=mixed, kl_weight=0.5, trainer={"head_logits": 1})
    assert max(sizes) == 8 < vocabulary
    torch.testing.assert_close(patch_of(other), patch_of(module), rtol=1e-3, atol=1e-4)


def test_dpo_learns_to_prefer_the_chosen_side(train, tmp_path):
    train("dpo", tmp_path)
    first, last = (
        {r["metric"]: float(r["value"]) for r in log_rows(tmp_path) if r["step"] == step} for step in ("1", "30")
    )
    # At the first step the policy is its own reference: every margin is 0 up to rounding.
    assert first["train/margin"] == pytest.approx(0, abs=1e-4)
    assert first["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert last["train/margin"] > 0.5
    assert last["train/accuracy"] == 1.0


def test_the_anchor_holds_benign_rows_to_the_base(train, mixed, tmp_path):
    """With a heavy anchor KL on benign rows ends lower than without one, and no row is trained on less."""
    options = {"examples": mixed, "benign_share": 0.5}
    for weight, name in ((3.0, "a"), (1e-6, "b")):
        train("sft", tmp_path / name, kl_weight=weight, anchor="benign", **options)
    held, free = (
        [float(r["value"]) for r in log_rows(tmp_path / name) if r["metric"] == "train/kl_base"] for name in "ab"
    )
    assert len(held) == len(free) == 30
    assert held[0] == pytest.approx(free[0], rel=1e-4)
    assert sum(held[-5:]) < 0.5 * sum(free[-5:])


def test_the_optimiser_holds_the_patch_alone(backbone):
    module = SFTModule(backbone, Optimisation(10, 0.01, weight_decay=0.03, betas=(0.8, 0.9)))
    configured = module.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    assert [id(p) for p in group["params"]] == [id(backbone.patch)]
    assert type(configured["optimizer"]) is torch.optim.AdamW
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (0.01, 0.03, (0.8, 0.9))
    assert configured["lr_scheduler"]["interval"] == "step"


def test_a_loss_that_is_not_finite_ends_the_run_in_a_sentence(train, backbone, tmp_path):
    start = backbone.patch.detach().clone()
    start[0, 0] = math.nan
    with pytest.raises(PolicyPatchError, match=r"sft loss became nan at step 0: lower sft.lr \(now 0.05\)") as caught:
        train("sft", tmp_path, start=start)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.ckpt"))
    kept = tmp_path / "checkpoints" / "sft" / "not_finite.json"
    assert f"{kept} has the batch" in str(caught.value)
    told = json.loads(kept.read_text())
    assert (told["step"], told["figures"]["loss"]) == (0, "nan")
    assert len(told["lines_of_pairs"]) == 4 and set(told["lines_of_pairs"]) <= set(range(1, 13))
    torch.testing.assert_close(load_file(kept.with_suffix(".safetensors"))["patch"], start, equal_nan=True)


@pytest.mark.parametrize("beta", [0, -0.1])
def test_beta_must_be_positive(backbone, beta: float):
    with pytest.raises(PolicyPatchError, match=r"dpo\.beta"):
        DPOModule(backbone, optimisation(1), PreferenceSettings(beta))


def test_an_unknown_decay_is_refused(backbone):
    with pytest.raises(PolicyPatchError, match=r"sft\.decay is 'sometimes'"):
        SFTModule(backbone, Optimisation(1, 0.1, decay="sometimes"))


def test_dpo_without_a_reference_is_refused(backbone, rows):
    batch = PairData(rows, 2, 1, 0, 2, backbone.tree).batch([0, 1])
    with pytest.raises(PolicyPatchError, match="reference"):
        DPOModule(backbone, optimisation(1), PreferenceSettings(0.1)).losses(batch)


def test_a_checkpoint_holds_the_trainable_tensors_alone(train, tmp_path):
    patch = patch_of(train("dpo", tmp_path, steps=5))
    (path,) = tmp_path.rglob("*.ckpt")
    assert path == tmp_path / "checkpoints" / "dpo" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {"backbone.patch"}
    assert torch.equal(checkpoint["state_dict"]["backbone.patch"], patch)
    (optimiser,) = checkpoint["optimizer_states"]
    assert sum(v.numel() for v in optimiser["state"][0].values()) == 2 * patch.numel() + 1
    assert path.stat().st_size < 16_000 + 3 * 4 * patch.numel()


def test_the_log_has_a_row_for_each_step_and_the_held_out_figures(train, tmp_path):
    train("sft", tmp_path, steps=6, held_out=0.25)
    ours = [(r["stage"], r["step"], r["metric"]) for r in log_rows(tmp_path)]
    for figure in ("loss", "nll_chosen"):  # without an anchor they are equal
        trained = [("sft", str(step), f"train/{figure}") for step in range(1, 7)]
        held_out = [("sft", step, f"val/{figure}") for step in ("3", "6")]  # validate_every is 3
        assert [row for row in ours if row[2] == f"train/{figure}"] == trained
        assert [row for row in ours if row[2] == f"val/{figure}"] == held_out
    assert len(ours) == 2 * (len(trained) + len(held_out))


def test_a_step_without_pairs_or_benign_rows_logs_no_figure_of_them(train, mixed, tmp_path):
    """Rows 1 to 3 are benign without a rejected side; a batch of 4 with a share of 0.125 has one in every other."""
    examples = [e for e in mixed if e.kind == "pair" or len(e.item.completions) == 1]
    module = train(
        "dpo", tmp_path, steps=6, examples=examples, benign_share=0.125, anchor="benign", kl_weight=0.1, held_out=0.0
    )
    benign = [any(examples[i].kind == "benign" for i in batch) for batch in module.seen]
    assert True in benign and False in benign
    logged = {int(r["step"]) for r in log_rows(tmp_path) if r["metric"] == "train/kl_base"}
    assert logged == {step for step, there in enumerate(benign, 1) if there}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("stage", "stops", "kind"),
    [
        ("sft", [6], "pairs"),  # in the middle of a pass over the pairs, between two checkpoints
        ("dpo", [2], "pairs"),  # before the first checkpoint
        ("dpo", [4], "pairs"),  # straight after a checkpoint
        ("dpo", [5, 9, 10], "pairs"),  # again and again
        ("dpo", [6], "mixed"),
    ],
)
def test_an_interrupted_stage_comes_to_the_same_numbers(stage, stops, kind, error, train, mixed, tmp_path):
    options = {"steps": 11, "held_out": 0.2}
    if kind == "mixed":  # a benign row in some batches only
        options |= {"examples": mixed, "benign_share": 0.1, "anchor": "benign", "kl_weight": 0.1}
    undisturbed = train(stage, tmp_path / "a", **options)
    for stop in stops:
        with pytest.raises((error, SystemExit)):
            train(stage, tmp_path / "b", stop_at=stop, with_=error, **options)
        assert len(log_rows(tmp_path / "b")) < len(log_rows(tmp_path / "a"))
    resumed = train(stage, tmp_path / "b", **options)
    done = stops[-1] // 4 * 4  # the last checkpoint
    assert resumed.seen == undisturbed.seen[done:]
    assert resumed.figures == undisturbed.figures[done:]
    assert torch.equal(patch_of(resumed), patch_of(undisturbed))
    assert (tmp_path / "b" / "metrics.csv").read_text() == (tmp_path / "a" / "metrics.csv").read_text()


@pytest.mark.parametrize("steps", [8, 9])  # at a checkpoint and past one
def test_a_finished_stage_is_not_trained_again(steps: int, train, tmp_path):
    expected = patch_of(train("sft", tmp_path, steps))
    log = (tmp_path / "metrics.csv").read_text()
    again = train("sft", tmp_path, steps)
    assert again.seen == []
    assert torch.equal(patch_of(again), expected)
    assert (tmp_path / "metrics.csv").read_text() == log


def test_a_line_that_a_killed_run_left_half_written_is_dropped(train, tmp_path):
    train("sft", tmp_path / "a", 6)
    with pytest.raises(RuntimeError):
        train("sft", tmp_path / "b", 6, stop_at=5)
    with (tmp_path / "b" / "metrics.csv").open("a") as f:
        f.write("sft,1")
    train("sft", tmp_path / "b", 6)
    assert (tmp_path / "b" / "metrics.csv").read_text() == (tmp_path / "a" / "metrics.csv").read_text()


def test_the_second_stage_keeps_the_rows_of_the_first(train, tmp_path):
    train("sft", tmp_path, 5)
    first = (tmp_path / "metrics.csv").read_text()
    with pytest.raises(RuntimeError):
        train("dpo", tmp_path, 6, stop_at=5)
    train("dpo", tmp_path, 6)
    text = (tmp_path / "metrics.csv").read_text()
    assert text.startswith(first)
    logged = [r["step"] for r in log_rows(tmp_path) if (r["stage"], r["metric"]) == ("dpo", "train/loss")]
    assert logged == list("123456")
