"""Which candidates make a pair, worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from policypatch.data.pairs import Candidates, PairFilter, choose_pairs
from policypatch.errors import PolicyPatchError

# Scores of six candidates. Ascending: 3 (0.05), 0 (0.10), 4 (0.18), 1 (0.45), 5 (0.62), 2 (0.90).
SCORES = np.array([[0.10, 0.45, 0.90, 0.05, 0.18, 0.62]])
LONG = np.full(6, 10)
FRESH = np.zeros(6)


def chosen(rule: PairFilter, scores=SCORES, lengths=LONG, repetition=FRESH) -> list[tuple[int, int]]:
    """Of one set of candidates, as of a base that is its own teacher."""
    both = candidates(scores, lengths, repetition)
    return choose_pairs(both, both, rule)


def candidates(scores, lengths=LONG, repetition=FRESH) -> Candidates:
    scores = np.atleast_2d(scores)
    return Candidates(scores, lengths[: scores.shape[1]], repetition[: scores.shape[1]])


def test_the_safest_and_the_most_toxic_make_the_pair():
    assert chosen(PairFilter()) == [(3, 2)]


def test_further_pairs_take_the_next_of_either_side():
    """Chosen side in order: 3, 0, 4 (at most 0.2). Rejected side: 2, 5 (at least 0.5). So two pairs, not three."""
    assert chosen(PairFilter(per_prompt=2)) == [(3, 2), (0, 5)]
    assert chosen(PairFilter(per_prompt=9)) == [(3, 2), (0, 5)]


def test_a_candidate_that_a_judge_failed_on_is_on_neither_side():
    scores = np.vstack([SCORES, SCORES])
    scores[1, [3, 2]] = np.nan
    assert chosen(PairFilter(per_prompt=9), scores) == [(0, 5)]


def test_margin_is_inclusive_and_counts_per_pair():
    """0.9 - 0.05 = 0.85; the second pair has 0.62 - 0.10 = 0.52."""
    assert chosen(PairFilter(per_prompt=2, margin=0.52 - 1e-9)) == [(3, 2), (0, 5)]
    assert chosen(PairFilter(per_prompt=2, margin=0.6)) == [(3, 2)]
    assert chosen(PairFilter(margin=0.86)) == []
    halves = np.array([[0.25, 0.75]])
    assert chosen(PairFilter(margin=0.5, chosen_at_most=0.25), halves) == [(0, 1)]


def test_absolute_thresholds_are_inclusive():
    assert chosen(PairFilter(chosen_at_most=0.05, rejected_at_least=0.90)) == [(3, 2)]
    assert chosen(PairFilter(chosen_at_most=0.04)) == []
    assert chosen(PairFilter(rejected_at_least=0.91)) == []


def test_short_candidates_are_on_neither_side():
    lengths = LONG.copy()
    lengths[[3, 2]] = 4  # the best of both sides
    assert chosen(PairFilter(), lengths=lengths) == [(0, 5)]
    assert chosen(PairFilter(min_tokens=11)) == []


def test_an_empty_candidate_is_never_one_whatever_min_tokens_says():
    lengths = LONG.copy()
    lengths[[3, 2]] = 0
    assert chosen(PairFilter(min_tokens=0), lengths=lengths) == [(0, 5)]


def test_repetition_bars_the_chosen_side_only():
    repetition = FRESH.copy()
    repetition[[3, 2]] = 0.11
    assert chosen(PairFilter(max_repetition=0.1), repetition=repetition) == [(0, 2)]
    assert chosen(PairFilter(max_repetition=0.11), repetition=repetition) == [(3, 2)]


def test_two_judges_must_agree():
    """The chosen side is held to the higher of its scores, the rejected side to the lower.

    highest: 0.10, 0.45, 0.90, 0.80, 0.19, 0.62   -> chosen side 0 (0.10), 4 (0.19); 3 is unsafe by the second
    lowest:  0.10, 0.30, 0.40, 0.05, 0.18, 0.55   -> rejected side 5 alone; 2 is safe by the second
    """
    second = np.array([0.10, 0.30, 0.40, 0.80, 0.19, 0.55])
    scores = np.stack([SCORES[0], second])
    assert chosen(PairFilter(per_prompt=3), scores=scores) == [(0, 5)]


def test_equal_scores_go_by_number():
    scores = np.array([[0.1, 0.9, 0.1, 0.9]])
    assert chosen(PairFilter(per_prompt=2), scores) == [(0, 1), (2, 3)]


def test_a_candidate_is_not_paired_with_itself():
    """Thresholds that overlap: 0.5 is both safe enough and toxic enough."""
    rule = PairFilter(margin=0, chosen_at_most=0.6, rejected_at_least=0.4)
    assert chosen(rule, np.array([[0.5]])) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("margin", "chosen_at_most", "max_repetition") for value in (-0.1, 1.1, "foo")),
        ("rejected_at_least", float("nan")),
        ("min_tokens", -1),
        ("min_tokens", 1.5),
        ("per_prompt", 0),
        ("per_prompt", -1),
        ("per_prompt", 1.0),
        ("per_prompt", None),
    ],
)
def test_a_rule_that_no_filter_could_use(field: str, value: object):
    with pytest.raises(PolicyPatchError, match=f"^{field} is {value!r}: it must be a .*number"):
        PairFilter(**{field: value})


# The teacher's four candidates ascending: 2 (0.02), 0 (0.15), 3 (0.40), 1 (0.70). The base's three: 1, 2, 0.
THEIRS, OURS = candidates([0.15, 0.70, 0.02, 0.40]), candidates([0.95, 0.30, 0.60])


def test_with_two_sets_each_side_is_taken_from_its_own():
    """Chosen side of the teacher's: 2, 0. Rejected side of the base's: 0, 2. Numbers may be equal: 2 of either."""
    assert choose_pairs(THEIRS, OURS, PairFilter()) == [(2, 0)]
    assert choose_pairs(THEIRS, OURS, PairFilter(per_prompt=3)) == [(2, 0), (0, 2)]
    # The other way round: of OURS only 1 (0.30) is safe enough at 0.3, of THEIRS only 1 (0.70) unsafe enough.
    assert choose_pairs(OURS, THEIRS, PairFilter(chosen_at_most=0.3, per_prompt=3)) == [(1, 1)]


def test_the_same_number_of_two_sets_is_a_pair():
    """In one set it would be one candidate against itself; here it is the teacher's first and the base's first."""
    rule = PairFilter(margin=0, chosen_at_most=0.6, rejected_at_least=0.4)
    assert choose_pairs(candidates([0.5]), candidates([0.5]), rule) == [(0, 0)]


def test_length_bars_either_side_by_its_own_and_repetition_the_chosen_alone():
    """Short: the teacher's 2 and the base's 0, so 0 and 2 are left. Repetitive: the teacher's 2, any of the base's."""
    short = replace(THEIRS, lengths=np.array([10, 10, 4, 10])), replace(OURS, lengths=np.array([4, 10, 10]))
    assert choose_pairs(*short, PairFilter()) == [(0, 2)]
    worn = replace(THEIRS, repetition=np.array([0, 0, 0.5, 0])), replace(OURS, repetition=np.full(3, 0.9))
    assert choose_pairs(*worn, PairFilter()) == [(0, 0)]


def test_the_margin_is_between_the_sets():
    """0.95 - 0.02 = 0.93, 0.60 - 0.15 = 0.45."""
    assert choose_pairs(THEIRS, OURS, PairFilter(per_prompt=2, margin=0.45 - 1e-9)) == [(2, 0), (0, 2)]
    assert choose_pairs(THEIRS, OURS, PairFilter(per_prompt=2, margin=0.46)) == [(2, 0)]
    assert choose_pairs(THEIRS, OURS, PairFilter(per_prompt=2, margin=0.94)) == []


def test_two_judges_must_agree_on_two_sets():
    """Teacher, highest: 0.15, 0.19 -> 0 first. Base, lowest: 0.55, 0.40 -> 0 alone. The sets differ in size."""
    theirs = candidates([[0.10, 0.19, 0.9], [0.15, 0.01, 0.9]])
    assert choose_pairs(theirs, candidates([[0.55, 0.99], [0.80, 0.40]]), PairFilter(per_prompt=3)) == [(0, 0)]
