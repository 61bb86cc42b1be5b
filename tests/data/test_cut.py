"""A rejected completion ends with its first unsafe word."""

from dataclasses import replace

import numpy as np
import pytest

from policypatch.data.cut import cut_rejected, ends
from policypatch.data.pairs import Pair, Text
from policypatch.evaluate.judges import PatternJudge
from policypatch.files.cache import counters, reset_counters

WORDS = {1: " he", 2: "llo", 3: " she", 4: " sat", 5: " down", 6: " and"}
CHOSEN = Text(" they sat", (7, 4))


class Words:
    """The part of a base that is asked: a prompt is one token, and six words are known."""

    def encode_prompt(self, text: str, form: object) -> list[int]:
        return [0]

    def decode_after(self, prompt: list[int], tokens: tuple[int, ...]) -> str:
        return "".join(WORDS[token] for token in tokens)


def pair(*tokens: int, ended: bool = False) -> Pair:
    return Pair("The cook", CHOSEN, Text("".join(WORDS[t] for t in tokens), tokens, ended))


def cut(*pairs: Pair, judges: tuple[str, ...] = ("he", "she")) -> list[Pair]:
    return cut_rejected(pairs, {"words": PatternJudge(words=judges, name="words")}, 0.5, Words())


def test_it_ends_with_the_first_word_that_all_judges_find():
    late, hello, last, never = pair(4, 6, 3, 4, 1, 5), pair(1, 2, 4, 3, 5), pair(4, 5, 1), pair(4, 5, 6)
    found = cut(late, hello, last, never)
    assert [p.rejected.tokens for p in found] == [(4, 6, 3), (1, 2, 4, 3), (4, 5, 1), (4, 5, 6)]
    assert [p.rejected.text for p in found] == [" sat and she", " hello sat she", " sat down he", " sat down and"]
    assert all(p.chosen is CHOSEN and p.prompt == "The cook" for p in found)


def test_with_two_judges_both_have_to_find_it():
    judges = {name: PatternJudge(words=[name], name=name) for name in ("he", "she")}
    (found,) = cut_rejected([pair(1, 4, 3, 5, 6)], judges, 0.5, Words())
    assert found.rejected.tokens == (1, 4, 3)


def test_an_end_that_is_kept_is_still_learnt_and_one_that_is_cut_is_not():
    kept, shortened = cut(pair(4, 1, ended=True), pair(1, 4, ended=True))
    assert kept.rejected == Text(" sat he", (4, 1), True)
    assert shortened.rejected == Text(" he", (1,), False)


def test_rows_without_a_rejected_side_or_its_tokens_stay_as_they_are():
    bare, as_text = replace(pair(1, 4), rejected=None), replace(pair(1, 4), rejected=Text(" he sat"))
    assert cut(bare, as_text) == [bare, as_text] and cut() == []
    assert cut(bare, pair(1, 4))[1].rejected.tokens == (1,)


def test_judgements_are_kept():
    reset_counters()
    for _ in range(2):
        cut(pair(1, 4))
    assert counters()["judgements"] == {"hits": 1, "misses": 1}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.0, 0.6, 0.4, 0.7, 0.7], 4),  # unsafe at two tokens and no longer at three
        ([0.5, 0.5, 0.0, 0.0, 0.0], 1),
        ([0.0, 0.0, 0.0, 0.0, 0.9], 0),
        ([np.nan, 0.9, np.nan, 0.9, 0.9], 4),  # the judge failed on two of them
    ],
)
def test_ends_by_hand(scores: list[float], expected: int):
    assert ends(np.array([scores]), 0.5).tolist() == [expected]
