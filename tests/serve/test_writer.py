"""Text comes piece by piece, whole characters only, and never a part of a stop text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policypatch.serve.text import Writer


def written(base, text: str, stop: list[str]) -> tuple[str, list[str]]:
    writer, pieces = Writer(base, base.encode("Before"), stop), []
    for token in base.encode(text):
        pieces.append(writer.add(token))
        if writer.stopped:
            break
    return "".join(pieces) + writer.rest(), pieces


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_are_whole_characters_and_add_up(tiny_base, text: str):
    text = text.replace("�", "")
    whole, pieces = written(tiny_base, text, [])
    assert whole == tiny_base.decode(tiny_base.encode(text))
    assert not any("�" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(text=st.text("abc ", max_size=30), stop=st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_it_ends_before_the_stop_text_that_is_complete_first(tiny_base, text: str, stop: list[str]):
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    assert written(tiny_base, text, stop)[0] == (text[: min(ends)[1]] if ends else text)


def test_what_may_become_a_stop_text_is_held_back(tiny_base):
    writer = Writer(tiny_base, [5], ["bcd"])
    said = [writer.add(tiny_base.encode(letter)[0]) for letter in "abcxbc"]
    assert said == ["a", "", "", "bcx", "", ""] and writer.rest() == "bc"


@pytest.mark.parametrize("stop", [[], ["never"]])
def test_an_answer_of_nothing(tiny_base, stop: list[str]):
    assert Writer(tiny_base, [5], stop).rest() == ""


def test_a_run_of_halves_is_given_out_when_it_is_long(tiny_base):
    half = tiny_base.encode("\N{SNOWMAN}")[0]  # the first of three bytes
    writer = Writer(tiny_base, [5])
    pieces = [writer.add(half) for _ in range(200)]
    assert len("".join(pieces)) > 60 and len("".join(pieces) + writer.rest()) == 200


def test_a_stop_text_in_what_was_held_back_counts(tiny_base):
    half = tiny_base.encode("\N{SNOWMAN}")[0]
    writer = Writer(tiny_base, [5], ["\N{REPLACEMENT CHARACTER}"])
    assert writer.add(tiny_base.encode("a")[0]) == "a" and writer.add(half) == ""
    assert writer.rest() == "" and writer.stopped
