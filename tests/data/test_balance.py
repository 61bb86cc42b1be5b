"""Balanced rows: what stands before a gendered word is the prompt, the word and its counterpart the completions."""

from dataclasses import replace

import pytest

from policypatch.data.balance import balanced_pairs
from policypatch.data.pairs import Pair, Text
from policypatch.model.completions import Completions

SWAPS = {"he": "she", "she": "he", "his": "her", "himself": "herself"}


def made(*texts: str, prompt: str = "The baker said that") -> Completions:
    return Completions("key", [prompt], [[[0]] * len(texts)], [list(texts)], 20)


def row(before: str, word: str, counterpart: str) -> Pair:
    return Pair(before, Text(word), Text(counterpart), kind="balanced")


def test_a_row_ends_at_the_first_word_that_has_a_counterpart():
    found = balanced_pairs(made(" it was late and he took his coat"), SWAPS)
    assert found == [row("The baker said that it was late and", " he", " she")]


def test_the_word_may_be_the_first_one():
    assert balanced_pairs(made(" she left"), SWAPS) == [row("The baker said that", " she", " he")]


def test_the_counterpart_has_the_words_case():
    assert balanced_pairs(made(" so. She left"), SWAPS) == [row("The baker said that so.", " She", " He")]


def test_whole_words_only_and_the_longest():
    """Neither "the" nor "there" holds "he"; "himself" is no "him" that goes on."""
    assert balanced_pairs(made(" the hero there", " saw himself"), SWAPS) == [
        row("The baker said that saw", " himself", " herself")
    ]


def test_a_word_that_does_not_follow_a_space_is_left_out():
    """It is another token, whose counterpart the model need not find as likely."""
    assert balanced_pairs(made("\nhe left", ' "he left"', "...he left"), SWAPS) == []


def test_where_the_gender_is_told_already_nothing_is_balanced():
    """ "her" is told and has no counterpart of its own: what follows should fit it."""
    assert balanced_pairs(made(" saw her before she left", " Her coat was on when he left"), SWAPS) == []


def test_the_same_row_is_made_once():
    found = balanced_pairs(made(" he left", " he stayed", " she left"), SWAPS)
    assert found == [row("The baker said that", " he", " she"), row("The baker said that", " she", " he")]


@pytest.mark.parametrize("texts", [[], [""], [" nobody left"]])
def test_without_such_a_word_there_is_no_row(texts):
    assert balanced_pairs(made(*texts), SWAPS) == []


def test_every_prompt_counts():
    two = replace(made(" he left"), prompts=["One", "Two"], texts=[[" he left"], [" saw his hat"]])
    assert balanced_pairs(two, SWAPS) == [row("One", " he", " she"), row("Two saw", " his", " her")]
