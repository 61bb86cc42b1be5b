"""Judges that fail on texts: which ones is found, the rest keep their scores, and a broken judge is not believed."""

import logging
from copy import copy

import numpy as np
import pytest
from tiny_run import HashJudge

from policypatch.errors import AtPrompt, PolicyPatchError
from policypatch.model.completions import Completions
from policypatch.model.judging import judged, judged_in_batches, judgements

TEXTS = [f"text {i}" for i in range(40)]


class Picky(HashJudge):
    """Raises whenever one of these is among the texts."""

    def __init__(self, *bad: str, error: type[Exception] = RuntimeError) -> None:
        super().__init__("picky")
        self.bad, self.error, self.calls = set(bad), error, 0

    def score(self, texts, prompts=None):
        self.calls += 1
        if self.bad & set(texts):
            raise self.error("no such word")
        return super().score(texts, prompts)


def test_a_judge_that_fails_on_nothing_is_asked_once():
    judge = Picky()
    assert np.array_equal(judged(judge, TEXTS, TEXTS, 4), HashJudge("picky").score(TEXTS))
    assert judge.calls == 1


@pytest.mark.parametrize("bad", [(0,), (39,), (17,), (3, 30)])
def test_texts_that_a_judge_fails_on_have_no_score_and_the_others_theirs(bad, caplog):
    judge = Picky(*(TEXTS[i] for i in bad))
    with caplog.at_level(logging.WARNING):
        scores = judged(judge, TEXTS, TEXTS, 4)
    assert np.flatnonzero(np.isnan(scores)).tolist() == list(bad)
    assert np.array_equal(np.delete(scores, bad), np.delete(HashJudge("picky").score(TEXTS), bad))
    assert judge.calls <= 1 + len(bad) * 2 * 6  # halves of 40: six levels
    (message,) = caplog.messages
    assert f"failed on {len(bad)} of 40 texts" in message and "RuntimeError: no such word" in message
    assert f"completion {bad[0] % 4 + 1} of prompt {bad[0] // 4 + 1}" in message


def test_a_judge_that_fails_on_many_is_broken():
    with pytest.raises(PolicyPatchError, match=r"judge picky: failed on 3 of 40 .*mend it.* text 1 \(.*no such word"):
        judged(Picky(*TEXTS), TEXTS, TEXTS, 1)


def test_one_text_of_few_may_fail_but_not_the_only_one():
    assert np.isnan(judged(Picky("b"), ["a", "b", "c"], ["", "", ""], 1)).tolist() == [False, True, False]
    with pytest.raises(PolicyPatchError, match="judge picky: failed on 1 of 1 texts"):
        judged(Picky("a"), ["a"], [""], 1)
    with pytest.raises(PolicyPatchError, match="judge picky: failed on 2 of 2 texts"):
        judged(Picky("a", "b"), ["a", "b"], ["", ""], 1)


def test_what_a_judge_says_itself_ends_the_run_as_it_says_it():
    with pytest.raises(PolicyPatchError, match=r"^no such word$"):
        judged(Picky(TEXTS[5], error=PolicyPatchError), TEXTS, TEXTS, 1)


def test_being_stopped_is_no_failure_of_the_judge():
    with pytest.raises(KeyboardInterrupt):
        judged(Picky(TEXTS[5], error=KeyboardInterrupt), TEXTS, TEXTS, 1)


def test_a_wrong_score_is_named_by_its_own_place_after_a_failure_before_it():
    class Wrong(Picky):
        def score(self, texts, prompts=None):
            scores = super().score(texts, prompts)
            scores[[text == TEXTS[30] for text in texts]] = 2.0
            return scores

    with pytest.raises(PolicyPatchError, match=r"judge picky: completion 3 of prompt 8 scored 2\.0"):
        judged(Wrong(TEXTS[1]), TEXTS, TEXTS, 4)


def test_nothing_to_judge():
    assert judged(Picky(), [], [], 1).shape == (0,)


def test_judgements_that_a_kill_came_between_go_on_behind_the_last_batch(monkeypatch, tmp_path):
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr("policypatch.model.judging.AT_ONCE", 10)  # texts: two prompts
    rows = [TEXTS[i : i + 4] for i in range(0, 40, 4)]
    made = Completions("key", [f"prompt {i}" for i in range(10)], [[[1]] * 4] * 10, rows, 1)

    class Dying(Picky):
        def score(self, texts, prompts=None):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().score(texts, prompts)

    with pytest.raises(KeyboardInterrupt):
        made.scores(Dying())
    judge = Picky()
    assert np.array_equal(made.scores(judge).reshape(-1), HashJudge("picky").score(TEXTS))
    assert judge.calls == 2  # of five batches


def test_failures_are_counted_over_all_batches():
    batches = [range(i, i + 10) for i in range(0, 40, 10)]
    bad = [TEXTS[0], TEXTS[11], TEXTS[22]]
    found = judged_in_batches(Picky(*bad[:2]), TEXTS, TEXTS, 1, batches, 40)
    assert np.flatnonzero(np.isnan(np.concatenate(list(found)))).tolist() == [0, 11]
    with pytest.raises(PolicyPatchError, match=r"failed on 3 of 40 .*text 1 \("):
        list(judged_in_batches(Picky(*bad), TEXTS, TEXTS, 1, batches, 40))


def test_a_judge_that_is_mended_is_asked_again_about_what_it_had_failed_on(monkeypatch, tmp_path):
    """Also where a batch had failed as a whole, which alone was not yet too many."""
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr("policypatch.model.judging.AT_ONCE", 1)
    texts = [[text] for text in TEXTS]
    for _ in range(3):
        with pytest.raises(PolicyPatchError, match="failed on 3 of 40 texts"):
            judgements(Picky(*TEXTS[10:]), texts, TEXTS, {"texts": TEXTS})
    judge = Picky()
    assert np.array_equal(judgements(judge, texts, TEXTS, {"texts": TEXTS})[:, 0], HashJudge("picky").score(TEXTS))
    assert judge.calls == 30  # the first ten stand


def test_of_several_ranks_each_looks_at_its_own_share(monkeypatch, tmp_path):
    """A broken judge fails on all of a rank's texts, which may be less than 5 % of everybody's."""
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr("policypatch.model.judging.ranks.share", lambda rows: range(10))
    with pytest.raises(PolicyPatchError, match="failed on 2 of 10 texts"):
        judgements(Picky(*TEXTS), [[text] for text in TEXTS], TEXTS, {"texts": TEXTS})


def test_what_a_judge_counts_from_the_first_it_was_asked_about_is_told_by_its_own_place():
    class Counting(Picky):
        def score(self, texts, prompts=None):
            if TEXTS[25] in texts:
                raise PolicyPatchError(f"judge picky: text {texts.index(TEXTS[25]) + 1} is odd")
            return super().score(texts, prompts)

    batches = [range(0, 20), range(20, 40)]
    with pytest.raises(AtPrompt, match=r"^judge picky: completion 2 of prompt 7 is odd$") as caught:
        list(judged_in_batches(Counting(), TEXTS, TEXTS, 4, batches, 40))
    assert caught.value.prompt == TEXTS[25]
    assert copy(caught.value).prompt == TEXTS[25]  # ranks tell it each other, which takes it apart in the same way
