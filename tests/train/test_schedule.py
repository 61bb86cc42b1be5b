"""The learning rate of every step, and the order of the rows, benign ones among them."""

import itertools
import math
from dataclasses import replace

import pytest

from policypatch.data.datamodule import Example, PairData, _mixed_schedule, _schedule
from policypatch.errors import PolicyPatchError
from policypatch.model.tree import Item
from policypatch.train.module import Optimisation, rate_at


def factors(steps: int, **options: object) -> list[float]:
    at = rate_at(Optimisation(steps=steps, lr=1.0, **options))
    return [at(step) for step in range(steps)]


def test_linear_by_hand():
    """10 steps, 2 of warm-up: 1/2, 1, then (10 - step) / 8 from 8/8 down to 1/8; 0 would waste a step."""
    expected = [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert factors(10, warmup=0.2, decay="linear") == pytest.approx(expected)


def test_cosine_goes_down_from_1_to_0():
    """After 2 steps of warm-up, (1 + cos(pi * done)) / 2 with done = (step - 2) / 8: 1 at step 2, 1/2 at step 6."""
    ours = factors(10, warmup=0.2, decay="cosine")
    assert ours == pytest.approx([0.5, 1.0] + [(1 + math.cos(math.pi * done / 8)) / 2 for done in range(8)], abs=1e-6)
    assert ours[6] == pytest.approx(0.5, abs=1e-6)
    assert all(later < earlier for earlier, later in itertools.pairwise(ours[2:]))
    assert rate_at(Optimisation(10, 1.0, 0.2, "cosine"))(10) == pytest.approx(0, abs=1e-6)


def test_constant_stays():
    assert factors(5, warmup=0.4, decay="constant") == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_every_rate_is_in_0_1_and_none_but_the_end_is_0(steps: int, warmup: float, decay: str):
    assert all(0 < factor <= 1 for factor in factors(steps, warmup=warmup, decay=decay))


def examples(count: int, benign: int = 0) -> list[Example]:
    """So many rows, the first ones benign."""
    return [Example(Item((i,), ((100 + i,), (200 + i,))), "benign" if i < benign else "pair") for i in range(count)]


def test_the_rows_of_several_risks_take_turns():
    """Groups of 2 and 3 rows: every step of 4 has two of each, whatever there are, and each comes up as often."""
    steps = _schedule([[0, 1], [10, 11, 12]], 4, 6, 0)
    assert all(sum(i < 10 for i in step) == 2 for step in steps)
    flat = [i for step in steps for i in step]
    assert {flat.count(i) for i in (0, 1)} == {6} and {flat.count(i) for i in (10, 11, 12)} == {4}


def test_a_batch_has_as_many_pairs_of_each_risk_beside_its_benign_rows():
    rows = [replace(row, part=1) if i >= 6 else row for i, row in enumerate(examples(14, benign=3))]
    data = PairData(rows, 8, 9, 0, 2, lambda group: group, benign_share=0.25)
    for batch in data.train_dataloader():
        parts = [rows[i].part for i in batch.pairs if rows[i].kind == "pair"]
        assert sorted(parts) == [0, 0, 0, 1, 1, 1]


def pair_data(count: int = 10, benign: int = 0, **options: object) -> PairData:
    settings = {"batch_size": 4, "steps": 6, "seed": 0, "completions": 2, "build": lambda group: group} | options
    return PairData(examples(count, benign), **settings)


def test_the_schedule_is_a_function_of_the_seed():
    assert _schedule([range(10)], 4, 6, 3) == _schedule([range(10)], 4, 6, 3)
    assert _schedule([range(10)], 4, 6, 3) != _schedule([range(10)], 4, 6, 4)


def test_a_longer_schedule_begins_with_the_shorter_one():
    assert _schedule([range(10)], 4, 9, 3)[:6] == _schedule([range(10)], 4, 6, 3)


def test_every_pass_takes_every_pair_once():
    flat = [i for group in _schedule([range(10)], 4, 10, 0) for i in group]
    passes = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_fewer_pairs_than_a_batch_are_taken_again():
    assert [len(group) for group in _schedule([range(3)], 8, 2, 0)] == [8, 8]


def test_held_out_pairs_are_never_trained_on():
    data = pair_data(held_out=0.2)
    assert len(data.validation) == 2
    assert sorted(data.validation + data.training) == list(range(10))
    assert not {i for batch in data.train_dataloader() for i in batch.pairs} & set(data.validation)
    assert [i for batch in data.val_dataloader() for i in batch.pairs] == data.validation


def test_holding_out_leaves_at_least_one_pair_on_either_side():
    assert len(pair_data(2, held_out=0.9).training) == 1
    assert len(pair_data(10, held_out=0.01).validation) == 1
    assert pair_data(1, held_out=0.5).validation == []
    assert pair_data(10, held_out=0.0).val_dataloader() == []


def test_sft_sees_the_chosen_side_alone():
    (batch, *_) = pair_data(completions=1).train_dataloader()
    assert [item.completions for item in batch.tree] == [((100 + i,),) for i in batch.pairs]


def test_the_loader_gives_every_step_once_and_starts_at_the_trainers_step():
    data = pair_data()
    everything = [batch.pairs for batch in data.train_dataloader()]
    assert len(everything) == 6

    class Trainer:
        global_step = 4

    data.trainer = Trainer()
    assert [batch.pairs for batch in data.train_dataloader()] == everything[4:]


def test_no_pairs_are_refused():
    with pytest.raises(PolicyPatchError, match="no pairs to train on"):
        pair_data(0)


def test_no_prompt_is_on_both_sides_of_the_split():
    rows = [Example(Item((i // 3, 7), ((1, 2), (3, 4)))) for i in range(30)]  # three pairs of each of ten prompts
    data = PairData(rows, 4, 2, seed=0, completions=2, build=lambda items: None, held_out=0.2)
    held_out, trained = ({rows[i].item.prompt for i in side} for side in (data.validation, data.training))
    assert not held_out & trained
    assert len(held_out) == 2
    assert sorted(data.validation + data.training) == list(range(30))


# --- benign rows in every batch -------------------------------------------------------------------------------------

RISKY, BENIGN = range(10, 20), range(10)


def benign_counts(share: float, batch_size: int, steps: int) -> list[int]:
    schedule = _mixed_schedule([RISKY], [BENIGN], share, batch_size, steps, seed=0)
    assert [len(group) for group in schedule] == [batch_size] * steps
    return [sum(i in BENIGN for i in group) for group in schedule]


def test_the_share_is_kept_to_the_nearest_row_at_every_step():
    """Rows seen after each step, times the share, rounded (halves to even), less those of the step before.

    0.25 of 4: 1, 2, 3, 4, ...      -> 1 a step
    0.25 of 2: 0.5, 1, 1.5, 2       -> 0, 1, 2, 2 seen  -> 0, 1, 1, 0
    0.4 of 4:  1.6, 3.2, 4.8, 6.4, 8 -> 2, 3, 5, 6, 8   -> 2, 1, 2, 1, 2
    0.1 of 3:  0.3, 0.6, 0.9, 1.2   -> 0, 1, 1, 1       -> 0, 1, 0, 0
    """
    assert benign_counts(0.25, 4, 5) == [1] * 5
    assert benign_counts(0.25, 2, 4) == [0, 1, 1, 0]
    assert benign_counts(0.4, 4, 5) == [2, 1, 2, 1, 2]
    assert benign_counts(0.1, 3, 4) == [0, 1, 0, 0]
    assert benign_counts(0, 4, 3) == [0, 0, 0]
    assert benign_counts(1, 4, 3) == [4, 4, 4]


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.77])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_share_of_all_rows_seen_is_never_off_by_more_than_half_a_row(share: float, batch_size: int):
    seen = list(itertools.accumulate(benign_counts(share, batch_size, 40)))
    assert all(abs(n - share * batch_size * step) <= 0.5 + 1e-9 for step, n in enumerate(seen, 1))


def test_either_kind_is_passed_through_as_if_it_were_alone():
    """Every row of a kind once before any is taken again, and another seed another order."""
    flat = [i for group in _mixed_schedule([RISKY], [BENIGN], 0.5, 4, 10, seed=0) for i in group]
    for kind in (RISKY, BENIGN):
        ours = [i for i in flat if i in kind]
        assert sorted(ours[:10]) == sorted(ours[10:]) == sorted(kind)
    assert _mixed_schedule([RISKY], [BENIGN], 0.5, 4, 6, 0) == _mixed_schedule([RISKY], [BENIGN], 0.5, 4, 6, 0)
    assert _mixed_schedule([RISKY], [BENIGN], 0.5, 4, 6, 0) != _mixed_schedule([RISKY], [BENIGN], 0.5, 4, 6, 1)


def test_a_longer_mixed_schedule_begins_with_the_shorter_one():
    assert _mixed_schedule([RISKY], [BENIGN], 0.3, 4, 9, 3)[:6] == _mixed_schedule([RISKY], [BENIGN], 0.3, 4, 6, 3)


def test_few_benign_rows_are_taken_as_often_as_the_share_asks():
    """2 benign of 10: half of 4 rows a step for 6 steps is each of them 6 times."""
    groups = [batch.pairs for batch in pair_data(benign=2, benign_share=0.5).train_dataloader()]
    assert [sum(i < 2 for i in group) for group in groups] == [2] * 6
    assert all(sum(group.count(i) for group in groups) == 6 for i in range(2))


@pytest.mark.parametrize(("benign", "share"), [(0, 0.5), (10, 0.5), (4, None)])
def test_rows_come_as_they_are_where_there_is_nothing_to_mix(benign: int, share: float | None):
    data = pair_data(benign=benign, benign_share=share)
    assert [list(batch.pairs) for batch in data.train_dataloader()] == _schedule([range(10)], 4, 6, 0)


def test_a_resumed_run_sees_the_mixed_batches_that_were_to_come():
    data = pair_data(benign=4, benign_share=0.3, held_out=0.2)
    everything = [batch.pairs for batch in data.train_dataloader()]

    class Trainer:
        global_step = 2

    again = pair_data(benign=4, benign_share=0.3, held_out=0.2)
    again.trainer = Trainer()
    assert [batch.pairs for batch in again.train_dataloader()] == everything[2:]
    assert not {i for group in everything for i in group} & set(data.validation)
