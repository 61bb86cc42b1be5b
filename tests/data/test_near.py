"""Near-duplicates among short requests: another frame, another order, another form of a word; and what is none."""

import time
from pathlib import Path

import pytest

import policypatch
from policypatch.data.near import near_duplicates, normalise
from policypatch.errors import PolicyPatchError

OTHERS = [
    "Give detailed instructions for descaling an espresso machine",
    "Give detailed instructions for pruning an apple tree",
    "Write a letter that asks the landlord for a new kitchen",
    "Explain how sailors find their way without a compass",
]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("give DETAILED instructions for descaling an espresso machine!", True),
        ("Give instructions for descaling espresso machines, step by step", True),
        ("Descaling an espresso machine: give detailed instructions", True),
        ("Give detailed instructions for knitting a scarf", False),  # the frame alone
        ("Write a poem about a kitchen", False),
        ("", False),
        ("...", False),
    ],
)
def test_what_says_nearly_the_same(text: str, found: bool):
    assert near_duplicates([text], OTHERS) == ({0} if found else set())


def test_what_many_of_the_texts_are_about_still_counts():
    """A subject that both sides are full of is common among them, and its frame is not."""
    about = [f"Tell me about kites number {i}" for i in range(200)]
    texts = ["How can I make a kite?", *about]
    assert 0 in near_duplicates(texts, ["How can I build a homemade kite?", *about], 0.45)
    assert 0 not in near_duplicates(texts, ["How can I make a cardigan?"], 0.45)


def test_numbers_are_those_of_the_texts():
    texts = ["Water the plants", OTHERS[2], "Fold the map", "How do sailors find their way without a compass?"]
    assert near_duplicates(texts, OTHERS) == {1, 3}


def test_a_threshold_of_one_finds_equal_words_only():
    texts = [OTHERS[0].upper(), OTHERS[0] + " today"]
    assert near_duplicates(texts, OTHERS, 1.0) == {0}
    assert near_duplicates(texts, OTHERS, 0.5) == {0, 1}


def test_nothing_is_like_nothing():
    assert near_duplicates([], OTHERS) == near_duplicates(OTHERS, []) == near_duplicates(["."], ["!"]) == set()


@pytest.mark.parametrize("threshold", [0, 1.1, "0.5", True, float("nan")])
def test_other_thresholds_are_refused(threshold):
    with pytest.raises(PolicyPatchError, match=r"^threshold is"):
        near_duplicates(["a"], ["b"], threshold)


def test_hundreds_of_texts_take_no_time():
    texts = [f"Write a note number {i} about subject {i * 7 % 13} for the club of year {i % 50}" for i in range(1500)]
    started = time.monotonic()
    near_duplicates(texts[:520], texts[500:])
    assert time.monotonic() - started < 2


def test_the_benign_requests_that_ship_are_measured_on_others_than_those_trained_on():
    folder = Path(policypatch.__file__).parent / "risks" / "prompts"
    plain, scary, plain_eval, scary_eval = (
        (folder / f"{name}.txt").read_text("utf-8").splitlines()
        for name in ("benign_train", "scary_train", "benign_eval", "scary_eval")
    )
    assert len(plain) >= 200 and min(len(scary), len(plain_eval), len(scary_eval)) >= 100
    trained, measured = [*plain, *scary], [*plain_eval, *scary_eval]
    assert len({normalise(text) for text in [*trained, *measured]}) == len(trained) + len(measured)
    assert near_duplicates(trained, measured, 0.45) == set()
