"""Metrics over prompts: values by hand, ranks, batches, missing values, intervals."""

import math

import numpy as np
import pytest
import torch

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.metrics import (
    AMT,
    GAS,
    MeanValue,
    Perplexity,
    Rate,
    ToxicRate,
    TrigramOverlap,
)
from policypatch.evaluate.statistics import paired_difference
from policypatch.model.completions import trigram_repetition

NAN = float("nan")
EVERY = [AMT, GAS, Rate, ToxicRate, Perplexity, lambda: Perplexity("median"), MeanValue, TrigramOverlap]


def fed(metric, *batches):
    for batch in batches:
        metric.update(torch.as_tensor(batch))
    return metric


def random_rows(n=40, k=5, seed=0):
    values = np.random.default_rng(seed).random((n, k))
    values[3, 2] = values[7] = NAN
    return torch.from_numpy(values)


def test_amt_by_hand():
    """Maxima 0.9, 0.2, 0.5 (NaN skipped): mean 1.6 / 3."""
    metric = fed(AMT(), [[0.1, 0.9], [0.2, 0.2], [NAN, 0.5]])
    assert metric.compute().item() == pytest.approx(1.6 / 3)
    np.testing.assert_allclose(metric.per_prompt(), [0.9, 0.2, 0.5])


def test_toxic_rate_by_hand():
    """Rows with a value >= 0.5: the first and, the threshold being inclusive, the third; NaN row left out."""
    metric = fed(ToxicRate(), [[0.1, 0.9], [0.2, 0.49], [0.5, 0.0], [NAN, NAN]])
    assert metric.compute().item() == pytest.approx(2 / 3)
    np.testing.assert_array_equal(metric.per_prompt(), [1, 0, 1, NAN])
    assert metric.count() == 3


def test_toxic_rate_interval_is_exact():
    """0 of 10 at 95 %: the upper end solves (1 - p)^10 = 0.025, p = 1 - 0.025^(1/10) = 0.30850."""
    low, high = fed(ToxicRate(), torch.zeros(10, 3)).interval()
    assert low == 0.0
    assert high == pytest.approx(0.3084971, abs=1e-6)


def test_gas_by_hand():
    """Shares 1/2 and, the NaN left out, 1/1: mean 3/4."""
    metric = fed(GAS(), [[1.0, 0.0], [NAN, 1.0]])
    assert metric.compute().item() == 0.75
    np.testing.assert_array_equal(metric.per_prompt(), [0.5, 1.0])


def test_upper_bounds():
    """At 0 of 10: of rates the exact 1 - 0.05^(1/10), of means in [0, 1] Bentkus' 1 - (0.05/e)^(1/10); else none."""
    zeros = torch.zeros(10, 3)
    for make in (Rate, ToxicRate):
        assert fed(make(), zeros).upper() == pytest.approx(1 - 0.05**0.1)
    for make in (AMT, GAS):
        assert fed(make(), zeros).upper(0.95) == pytest.approx(1 - (0.05 / math.e) ** 0.1)
        assert fed(make(), zeros).upper(0.8) < fed(make(), zeros).upper(0.95)
    for make in (Perplexity, MeanValue, TrigramOverlap):
        assert fed(make(), zeros).upper() is None


def test_an_upper_bound_takes_what_a_judge_failed_on_for_a_case():
    for make in (AMT, GAS, Rate):
        assert fed(make(), [[0.0, NAN], [NAN, NAN]]).upper() == fed(make(), [[0.0, 1.0], [1.0, 1.0]]).upper()
        assert fed(make(), [[0.0, 0.0], [NAN, NAN]]).compute() == 0.0  # the figure itself leaves it out


def test_a_mean_of_values_outside_its_range_has_no_bound():
    with pytest.raises(PolicyPatchError, match=r"in \[0, 1\]"):
        fed(AMT(), [[1.5]]).upper()


def test_perplexity_by_hand():
    """NLLs ln 2, ln 4, ln 9 and one empty: mean (2 + 4 + 9) / 3 = 5, median 4."""
    rows = [[math.log(2), math.log(4)], [NAN, math.log(9)]]
    mean, median = fed(Perplexity(), rows), fed(Perplexity("median"), rows)
    assert mean.compute().item() == pytest.approx(5)
    assert median.compute().item() == pytest.approx(4)
    np.testing.assert_allclose(mean.per_prompt(), [3, 9])


def test_median_of_an_even_number_is_the_middle_of_two():
    """Perplexities 1, 2, 4, 8: median 3."""
    metric = fed(Perplexity("median"), [[math.log(v)] for v in (8, 1, 4, 2)])
    assert metric.compute().item() == pytest.approx(3)


def test_mean_value_weighs_prompts_alike():
    """Prompt means 1 and 4, although the second has fewer values: 2.5."""
    assert fed(MeanValue(), [[0.0, 2.0], [NAN, 4.0]]).compute().item() == 2.5


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0.0),
        ([1, 2], 0.0),
        ([1, 2, 3], 0.0),
        # Trigrams of aaaaa: aaa three times, one distinct: 1 - 1/3.
        ("aaaaa", 2 / 3),
        # abc bca cab abc: four, three distinct: 1 - 3/4.
        (["a", "b", "c", "a", "b", "c"], 0.25),
    ],
)
def test_trigram_repetition_by_hand(tokens, expected):
    assert trigram_repetition(tokens) == pytest.approx(expected)


@pytest.mark.parametrize("make", EVERY)
def test_batches_do_not_matter(make):
    rows = random_rows()
    whole, split = fed(make(), rows), fed(make(), rows[:1], rows[1:30], rows[30:])
    assert whole.compute() == split.compute()
    assert whole.interval() == split.interval()
    np.testing.assert_array_equal(whole.per_prompt(), split.per_prompt())


@pytest.mark.parametrize("make", EVERY)
def test_two_ranks_give_what_one_gives(make):
    """What torchmetrics does on sync: each rank's state concatenated, then reduced by "cat"."""
    rows = random_rows()
    ranks = [fed(make(), rows[:10], rows[10:25]), fed(make(), rows[25:])]
    states = [torch.cat(rank.rows) for rank in ranks]
    merged = make()
    merged.rows = merged._reductions["rows"](states)
    merged._update_count = 1
    one = fed(make(), rows)
    assert merged.compute() == one.compute()
    assert merged.interval() == one.interval()


def two_ranks(rank, port, queue):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = random_rows()
    metric = fed(AMT(), rows[:25] if rank == 0 else rows[25:])
    queue.put((rank, metric.compute().item()))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(two_ranks, (port, queue), nprocs=2)
    results = dict(queue.get() for _ in range(2))
    expected = fed(AMT(), random_rows()).compute().item()
    assert results == {0: pytest.approx(expected), 1: pytest.approx(expected)}


@pytest.mark.parametrize("make", EVERY)
def test_interval_holds_the_figure_and_follows_the_seed(make):
    metric = fed(make(), random_rows(n=200))
    low, high = metric.interval(seed=1)
    assert low <= metric.compute().item() <= high
    assert metric.interval(seed=1) == (low, high)


def test_interval_draws_prompts_not_samples():
    """All k samples of a prompt are equal, so k tells nothing: as wide with k = 20 as with k = 1."""
    column = torch.from_numpy(np.random.default_rng(0).random((50, 1)))
    one, twenty = fed(Perplexity(), column), fed(Perplexity(), column.expand(50, 20))
    assert twenty.interval() == pytest.approx(one.interval())


def test_reset_forgets():
    metric = fed(AMT(), [[0.9]])
    metric.reset()
    assert fed(metric, [[0.1, 0.2]]).compute().item() == pytest.approx(0.2)


@pytest.mark.parametrize("make", EVERY)
def test_no_values_give_nan(make):
    assert math.isnan(fed(make(), [[NAN, NAN]]).compute().item())


def test_another_number_of_samples_is_refused():
    with pytest.raises(PolicyPatchError, match="had 2, now 3"):
        fed(AMT(), [[0.1, 0.2]], [[0.1, 0.2, 0.3]])


@pytest.mark.parametrize("values", [torch.zeros(2, 3, 4), torch.zeros(2, 0), torch.tensor(1.0)])
def test_another_shape_is_refused(values):
    with pytest.raises(PolicyPatchError, match="AMT: values must be"):
        AMT().update(values)


def test_infinite_values_are_refused():
    with pytest.raises(PolicyPatchError, match="infinite"):
        Perplexity().update(torch.tensor([[float("inf")]]))


def test_an_unknown_statistic_is_refused():
    with pytest.raises(PolicyPatchError, match="mean or median"):
        Perplexity("mode")


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(PolicyPatchError, match="at least one"):
        AMT().interval()


def test_difference_pairs_the_prompts():
    """Both arms differ by exactly 0.25 on every prompt, so however prompts are drawn the difference is 0.25."""
    base = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) / 2
    low_arm, high_arm = MeanValue(), MeanValue()
    low_arm.update(base)
    high_arm.update(base + 0.25)
    delta, low, high = high_arm.difference(low_arm)
    assert (delta, low, high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)


def test_difference_of_medians_is_the_difference_of_the_figures():
    """exp(log 4) - exp(log 2): medians 4 and 2, so 2; a mean of per-prompt differences would say otherwise."""
    ours, theirs = Perplexity("median"), Perplexity("median")
    ours.update(torch.log(torch.tensor([[4.0], [4.0], [400.0]])))
    theirs.update(torch.log(torch.tensor([[2.0], [2.0], [3.0]])))
    assert ours.difference(theirs)[0] == pytest.approx(2.0)


def test_difference_refuses_other_prompts():
    ours, theirs = AMT(), AMT()
    ours.update(torch.rand(3, 2))
    theirs.update(torch.rand(4, 2))
    with pytest.raises(PolicyPatchError, match="cannot be paired"):
        ours.difference(theirs)


def test_perplexity_is_tested_on_the_log_scale():
    """Twenty prompts from 10 to 20 and one from 500 to 10: the mean falls, but nearly every prompt rises."""
    ours, theirs = Perplexity("median"), Perplexity("median")
    ours.update(torch.log(torch.tensor([[20.0]] * 20 + [[10.0]])))
    theirs.update(torch.log(torch.tensor([[10.0]] * 20 + [[500.0]])))
    difference = paired_difference(ours.tested_values().numpy(), theirs.tested_values().numpy())
    assert difference.mean == pytest.approx((20 * math.log(2) + math.log(10 / 500)) / 21)
    assert difference.p_value < 0.05 < paired_difference(ours.per_prompt().numpy(), theirs.per_prompt().numpy()).p_value
