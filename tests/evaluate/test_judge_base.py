"""Behaviour that every judge shares: blanks, duplicates, batches, refused answers."""

import numpy as np
import pytest

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import BaseJudge, Judge


class LengthJudge(BaseJudge):
    """Scores a text by its length and remembers what it was asked."""

    def __init__(self, batch_size=3, answer=None):
        super().__init__("length", batch_size)
        self.fingerprint = "length:1"
        self.batches = []
        self.answer = answer

    def _score_batch(self, texts):
        self.batches.append(list(texts))
        return np.array([self.answer if self.answer is not None else len(t) / 100 for t in texts])


def test_a_subclass_is_a_judge():
    assert isinstance(LengthJudge(), Judge)


def test_scores_come_back_in_the_order_of_the_texts():
    scores = LengthJudge().score(["aaaa", "a", "aa", "aaa", "aaaaa"])
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, [0.04, 0.01, 0.02, 0.03, 0.05])


def test_equal_texts_are_scored_once():
    judge = LengthJudge()
    np.testing.assert_allclose(judge.score(["aa", "b", "aa", "aa"]), [0.02, 0.01, 0.02, 0.02])
    assert sorted(text for batch in judge.batches for text in batch) == ["aa", "b"]


def test_blank_texts_score_zero_and_are_never_asked():
    judge = LengthJudge(answer=0.9)
    assert judge.score(["", "  \n", "word"]).tolist() == [0.0, 0.0, 0.9]
    assert judge.batches == [["word"]]


def test_no_texts_give_no_scores():
    assert LengthJudge().score([]).shape == (0,)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batches_do_not_change_scores_and_respect_their_size(batch_size):
    texts = ["a" * n for n in range(1, 20)]
    judge = LengthJudge(batch_size)
    np.testing.assert_array_equal(judge.score(texts), LengthJudge(3).score(texts))
    assert max(len(batch) for batch in judge.batches) <= batch_size


@pytest.mark.parametrize("wrong", [float("nan"), 1.5, -0.2, float("inf")])
def test_a_score_outside_the_interval_names_judge_and_row(wrong):
    with pytest.raises(PolicyPatchError, match="judge length: text 3 "):
        LengthJudge(answer=wrong).score(["", " ", "third"])


def test_the_wrong_number_of_scores_is_refused():
    judge = LengthJudge()
    judge._score_batch = lambda texts: np.zeros(len(texts) + 1)
    with pytest.raises(PolicyPatchError, match=r"judge length: returned scores of shape \(3,\) for 2 texts"):
        judge.score(["a", "b"])


def test_rounding_errors_are_clipped():
    assert LengthJudge(answer=1 + 1e-7).score(["a"])[0] == 1.0


def test_one_string_is_not_a_list_of_texts():
    with pytest.raises(PolicyPatchError, match="not one string"):
        LengthJudge().score("word")


def test_a_row_that_is_no_text_is_named():
    with pytest.raises(PolicyPatchError, match="text 2 is NoneType"):
        LengthJudge().score(["a", None])


def test_batch_size_zero_is_refused():
    with pytest.raises(PolicyPatchError, match="batch_size"):
        LengthJudge(batch_size=0)


class AnswerJudge(LengthJudge):
    """Scores a text and its request by their lengths."""

    reads_prompt = True

    def _score_batch(self, texts, prompts):
        self.batches.append(list(zip(prompts, texts, strict=True)))
        return np.array([len(t) / 100 + len(p) / 10 for t, p in zip(texts, prompts, strict=True)])


def test_a_judge_that_reads_prompts_gets_them_beside_their_texts():
    judge = AnswerJudge()
    scores = judge.score(["aa", "aa", "", "aa", "b"], ["x", "yy", "x", "x", "x"])
    np.testing.assert_allclose(scores, [0.12, 0.22, 0, 0.12, 0.11])
    # The same text behind another request is another question; the same pair is asked once, the blank never.
    assert sorted(pair for batch in judge.batches for pair in batch) == [("x", "aa"), ("x", "b"), ("yy", "aa")]


def test_a_judge_that_reads_no_prompts_ignores_them():
    judge = LengthJudge()
    assert judge.score(["aa", "aa"], ["x", "y"]).tolist() == [0.02, 0.02]
    assert judge.batches == [["aa"]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "reads the request"),
        (["x"], "2 texts but 1 prompts"),
        ("xy", "not one string"),
        (["x", 1], "text 2 is int"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, message):
    with pytest.raises(PolicyPatchError, match=message):
        AnswerJudge().score(["a", "b"], prompts)
