"""What both stages minimise, held against plain concatenation: pairs, benign rows, and the anchor to the base."""

import pytest
import torch

from policypatch.data.datamodule import Example, PairData
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.tree import Item
from policypatch.train.dpo_module import DPOModule, PreferenceSettings
from policypatch.train.figures import Figure, share_of_loss, whole, with_loss
from policypatch.train.module import Optimisation, StageModule
from policypatch.train.pair_stage import Weights
from policypatch.train.sft_module import SFTModule

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STEP = Optimisation(1, 0.02)


def module(stage: str, backbone: PrefixBackbone, kl_weight: float = 0.0, nll_weight: float = 0.3) -> StageModule:
    if stage == "sft":
        return SFTModule(backbone, STEP, Weights(kl_weight))
    return DPOModule(backbone, STEP, PreferenceSettings(0.3, nll_weight, 0.1), Weights(kl_weight))


def data(stage: str, backbone: PrefixBackbone, examples: list[Example], anchor: str | None = None) -> PairData:
    """References are any numbers, NaN where there is no rejected side."""
    reference = -10 * torch.rand(len(examples), 2, generator=torch.Generator().manual_seed(2))
    reference[[len(e.item.completions) == 1 for e in examples], 1] = torch.nan
    completions = 1 if stage == "sft" else 2
    return PairData(examples, 4, 1, 0, completions, backbone.tree, reference, anchor=anchor)


def figures(stage_module: StageModule, batch) -> dict[str, torch.Tensor]:
    return {name: figure.value for name, figure in stage_module.losses(batch).items()}


@pytest.fixture
def preference(summed):
    """preference(backbone, example, reference) -> a pair's loss: beta 0.3, one label in ten wrong."""

    def by_hand(backbone: PrefixBackbone, example: Example, reference: torch.Tensor) -> torch.Tensor:
        chosen, rejected = (summed(backbone, example.item, side, backbone.patch) for side in (0, 1))
        margin = 0.3 * ((chosen - reference[0]) - (rejected - reference[1]))
        return 0.9 * torch.log1p(torch.exp(-margin)) + 0.1 * torch.log1p(torch.exp(margin))

    return by_hand


@pytest.fixture
def nll(summed):
    """nll(backbone, example) -> of the chosen side, per token."""

    def by_hand(backbone: PrefixBackbone, example: Example) -> torch.Tensor:
        return -summed(backbone, example.item, 0, backbone.patch) / len(example.item.completions[0])

    return by_hand


@pytest.fixture
def divergence(table):
    """divergence(backbone, example) -> KL(base || patched), mean over the chosen side's tokens."""

    def by_hand(backbone: PrefixBackbone, example: Example) -> torch.Tensor:
        ours, base = (table(backbone, example.item, 0, patch) for patch in (backbone.patch, backbone.patch[:0]))
        return (base.exp() * (base - ours)).sum(-1).mean()

    return by_hand


@torch.no_grad()
@pytest.mark.parametrize("nll_weight", [0.0, 0.7])
@pytest.mark.parametrize("kl_weight", [0.0, 0.4])
def test_dpo_loss_of_pairs_is_the_sum_of_its_parts(nll_weight, kl_weight, backbone, rows, preference, nll, divergence):
    """Sums for the preference, means per token of the chosen side for the anchors, each a mean over the rows."""
    batch = data("dpo", backbone, rows, "all" if kl_weight else None).batch([0, 3, 5, 7, 8])
    found = figures(module("dpo", backbone, kl_weight, nll_weight), batch)
    picked = [rows[i] for i in batch.pairs]
    parts = {
        "preference_loss": [preference(backbone, e, r) for e, r in zip(picked, batch.reference, strict=True)],
        "nll_chosen": [nll(backbone, e) for e in picked],
        "kl_base": [divergence(backbone, e) for e in picked],
    }
    means = {name: torch.stack(values).mean() for name, values in parts.items()}
    assert ("kl_base" in found) == (kl_weight > 0)
    for name in set(means) & set(found):
        torch.testing.assert_close(found[name], means[name], **CLOSE)
    expected = means["preference_loss"] + nll_weight * means["nll_chosen"] + kl_weight * means["kl_base"]
    torch.testing.assert_close(found["loss"], expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kl_weight", [0.0, 0.4])
def test_dpo_loss_of_mixed_rows(kl_weight, backbone, mixed, preference, nll, divergence):
    """Rows 5, 0, 2, 8: preference over 5, 0 and 8 (2 has no rejected side), NLL over all, KL over benign 0 and 2."""
    batch = data("dpo", backbone, mixed, "benign" if kl_weight else None).batch([5, 0, 2, 8])
    figures_found = module("dpo", backbone, kl_weight).losses(batch)
    preferences = torch.stack([preference(backbone, mixed[i], batch.reference[b]) for b, i in ((0, 5), (1, 0), (3, 8))])
    nlls = torch.stack([nll(backbone, mixed[i]) for i in (5, 0, 2, 8)])
    kls = torch.stack([divergence(backbone, mixed[i]) for i in (0, 2)])
    expected = preferences.mean() + 0.3 * nlls.mean() + kl_weight * kls.mean()
    torch.testing.assert_close(figures_found["loss"].value, expected, **CLOSE)
    torch.testing.assert_close(figures_found["preference_loss"].value, preferences.mean(), **CLOSE)
    over = {"loss": 4, "nll_chosen": 4, "preference_loss": 3, "margin": 3, "accuracy": 3}
    over |= {"chosen_reward": 3, "rejected_reward": 3} | ({"kl_base": 2} if kl_weight else {})
    assert {name: figure.rows for name, figure in figures_found.items()} == over


def test_dpo_of_benign_rows_alone_has_no_preference(backbone, mixed, nll):
    batch = data("dpo", backbone, mixed).batch([1, 2])
    found = figures(module("dpo", backbone), batch)
    assert set(found) == {"loss", "nll_chosen"}
    with torch.no_grad():
        torch.testing.assert_close(
            found["loss"], 0.3 * (nll(backbone, mixed[1]) + nll(backbone, mixed[2])) / 2, **CLOSE
        )
    found["loss"].backward()
    assert torch.isfinite(backbone.patch.grad).all() and backbone.patch.grad.abs().max() > 0


def test_a_batch_that_says_nothing_moves_nothing(backbone, mixed):
    loss = module("dpo", backbone, nll_weight=0.0).losses(data("dpo", backbone, mixed).batch([1, 2]))["loss"].value
    loss.backward()
    assert loss == 0 and backbone.patch.grad.abs().max() == 0


@torch.no_grad()
def test_sft_loss_is_the_mean_nll_per_token_of_the_chosen_side(backbone, mixed, nll):
    found = figures(module("sft", backbone), data("sft", backbone, mixed).batch([0, 1, 6]))
    torch.testing.assert_close(found["loss"], torch.stack([nll(backbone, mixed[i]) for i in (0, 1, 6)]).mean(), **CLOSE)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("anchor", [None, "all"])
def test_one_batch_of_8_is_8_batches_of_1(stage: str, anchor: str | None, backbone, rows):
    """Loss and gradient: nothing is normalised by what else is in the batch."""
    ours, source = module(stage, backbone, 0.4), data(stage, backbone, rows, anchor)
    assert_same_mean(ours, source, [[*range(8)]], [[i] for i in range(8)])


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("anchor", [None, "benign", "all"])
def test_a_mixed_batch_split_into_like_halves(stage: str, anchor: str | None, backbone, mixed):
    """Each half has two pairs of the risk and one benign row without rejected, as the schedule hands them out."""
    ours, source = module(stage, backbone, 0.4), data(stage, backbone, mixed, anchor)
    assert_same_mean(ours, source, [[4, 5, 1, 6, 7, 2]], [[4, 5, 1], [6, 7, 2]])


def assert_same_mean(ours: StageModule, source: PairData, whole: list[list[int]], split: list[list[int]]) -> None:
    def mean_over(batches: list[list[int]]) -> tuple[float, torch.Tensor]:
        ours.backbone.patch.grad = None
        loss = torch.stack([ours.losses(source.batch(batch))["loss"].value for batch in batches]).mean()
        loss.backward()
        return loss.item(), ours.backbone.patch.grad.clone()

    (loss, gradient), (split_loss, split_gradient) = mean_over(whole), mean_over(split)
    assert split_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-3, atol=1e-5)


SPLITS = pytest.mark.parametrize("split", [[[4, 0], [1, 2, 5]], [[4, 5], [0, 1], [2]]])


@SPLITS
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_ranks_come_to_the_whole_batch_however_it_is_split(stage: str, split: list[list[int]], backbone, mixed):
    """One share has no benign row, another nothing else: figures and mean gradient are the whole batch's."""
    ours, source = module(stage, backbone, 0.4), data(stage, backbone, mixed, "benign")
    expected = ours.losses(source.batch([i for group in split for i in group]))
    shares = [ours.losses(source.batch(group)) for group in split]
    found = whole(shares)
    assert {name: figure.rows for name, figure in found.items()} == {n: f.rows for n, f in expected.items()}
    for name, figure in found.items():
        torch.testing.assert_close(figure.value, expected[name].value, **CLOSE)
    losses = [share_of_loss(share, found, len(split)) for share in shares]
    mean = torch.stack(losses).mean()
    gradients = (torch.autograd.grad(loss, backbone.patch)[0] for loss in (mean, expected["loss"].value))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_shares_by_hand():
    """Means of 1 (3 rows) and 5 (1 row) make 2; weighted by 0.5, and by 2 what one rank has, 0.5 * 2 + 2 * 3 = 7."""
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    c = torch.tensor(3.0, requires_grad=True)
    shares = [with_loss({"x": Figure(a, 3, 0.5)}, 3), with_loss({"x": Figure(b, 1, 0.5), "y": Figure(c, 2, 2.0)}, 1)]
    found = whole(shares)
    assert [(f.value.item(), f.rows) for f in found.values()] == [(7.0, 4), (2.0, 4), (3.0, 2)]
    sum(share_of_loss(share, found, 2) for share in shares).backward()
    assert [x.grad.item() / 2 for x in (a, b, c)] == [0.375, 0.125, 2.0]  # 0.5 * 3/4, 0.5 * 1/4, 2


def test_a_share_whose_rows_are_anothers_has_no_part_in_it():
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(9.0, requires_grad=True)
    shares = [with_loss({"x": Figure(a, 3, 1.0)}, 3), with_loss({"x": Figure(b, 0, 1.0)}, 0)]
    found = whole(shares)
    assert found["loss"].value == 1.0 and found["loss"].rows == 3
    sum(share_of_loss(share, found, 2) for share in shares).backward()
    assert (a.grad.item(), b.grad.item()) == (2.0, 0.0)


# --- the anchor -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_patch_of_nothing_is_at_no_distance(stage: str, tiny_base, mixed):
    nothing = PrefixBackbone(tiny_base.model, torch.zeros(0, tiny_base.width), 64)
    found = figures(module(stage, nothing, 0.4), data(stage, nothing, mixed, "all").batch([0, 1, 5]))
    assert found["kl_base"].item() == pytest.approx(0, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize(("anchor", "held"), [("benign", [1, 0]), ("all", [5, 1, 0, 9])])
def test_the_anchor_is_the_kl_of_the_rows_it_is_for(stage, anchor, held, backbone, mixed, divergence):
    source = data(stage, backbone, mixed, anchor)
    found = module(stage, backbone, 0.4).losses(source.batch([5, 1, 0, 9]))
    expected = torch.stack([divergence(backbone, mixed[i]) for i in held])
    assert expected.min() > 0.01  # the patch is random: the base is far
    torch.testing.assert_close(found["kl_base"].value, expected.mean(), **CLOSE)
    assert found["kl_base"].rows == len(held)
    without = figures(module(stage, backbone), data(stage, backbone, mixed).batch([5, 1, 0, 9]))
    torch.testing.assert_close(found["loss"].value, without["loss"] + 0.4 * expected.mean(), **CLOSE)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_anchors_gradient_is_that_of_the_kl_by_hand(stage: str, backbone, mixed, divergence):
    source = data(stage, backbone, mixed, "benign")
    module(stage, backbone, 1.0).losses(source.batch([5, 1, 0]))["kl_base"].value.backward()
    ours = backbone.patch.grad.clone()
    backbone.patch.grad = None
    ((divergence(backbone, mixed[1]) + divergence(backbone, mixed[0])) / 2).backward()
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, backbone.patch.grad, rtol=1e-3, atol=1e-5)


def test_without_a_weight_or_a_benign_row_there_is_no_anchor(backbone, mixed):
    with torch.no_grad():
        assert "kl_base" not in module("dpo", backbone).losses(data("dpo", backbone, mixed, "benign").batch([0, 5]))
        source = data("dpo", backbone, mixed, "benign")
        assert "kl_base" not in module("dpo", backbone, 0.4).losses(source.batch([4, 5]))


# --- rows beside the batch ------------------------------------------------------------------------------------------


def beside(stage: str, backbone: PrefixBackbone, weights: Weights, rows: list[Example]) -> dict[str, torch.Tensor]:
    """The figures of pairs 5 and 9 with rows 0 and 1 as texts, 2 and 3 as balanced ones."""
    source = data(stage, backbone, rows)
    ours = module(stage, backbone)
    ours.weights = weights
    found = ours.losses(source.batch([5, 9], [0, 1], [2, 3]))
    assert {name: figure.rows for name, figure in found.items() if name in ("kl_texts", "imbalance")} == {
        name: 2 for name, weight in (("kl_texts", weights.texts), ("imbalance", weights.balance)) if weight
    }
    return {name: figure.value for name, figure in found.items()}


@pytest.fixture
def rows_beside(rows) -> list[Example]:
    """Two texts without a rejected side, two balanced rows, pairs."""
    alone = [Example(Item(row.item.prompt, row.item.completions[:1]), "text") for row in rows[:2]]
    return [*alone, *(Example(row.item, "balanced") for row in rows[2:4]), *rows[4:]]


@torch.no_grad()
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_texts_and_balanced_rows_add_their_own_parts(stage: str, backbone, rows_beside, divergence, summed):
    """KL of the texts, mean over tokens then rows; log cosh(d / 2) of each balanced row's two log-probabilities.

    (The same as -1/2 log s(d) - 1/2 log s(-d) - log 2, as s(d) s(-d) = 1 / (2 cosh(d / 2))^2.)
    """
    found = beside(stage, backbone, Weights(texts=0.7, balance=0.2), rows_beside)
    kl = torch.stack([divergence(backbone, rows_beside[i]) for i in (0, 1)]).mean()
    gaps = [
        summed(backbone, rows_beside[i].item, 0, backbone.patch)
        - summed(backbone, rows_beside[i].item, 1, backbone.patch)
        for i in (2, 3)
    ]
    imbalance = torch.stack([torch.log(torch.cosh(gap / 2)) for gap in gaps]).mean()
    torch.testing.assert_close(found["kl_texts"], kl, **CLOSE)
    torch.testing.assert_close(found["imbalance"], imbalance, **CLOSE)
    alone = beside(stage, backbone, Weights(), rows_beside)
    torch.testing.assert_close(found["loss"], alone["loss"] + 0.7 * kl + 0.2 * imbalance, **CLOSE)
    assert kl > 0.01 and imbalance > 0.01 and set(found) - set(alone) == {"kl_texts", "imbalance"}
