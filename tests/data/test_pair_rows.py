"""Pairs as rows of a file, and pairs as tokens."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from policypatch.data.datamodule import Example, encode_pair
from policypatch.data.pairs import Pair, Text, load_pairs, parse_pair, save_pairs
from policypatch.errors import PolicyPatchError
from policypatch.model.form import CHAT, PLAIN, Form
from policypatch.model.tree import Item

PAIR = Pair("A prompt", Text(" fine", (5, 6), True), Text(" fou\u2028l", (7,)), 0.1, 0.9)
GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


def test_pairs_survive_their_file(tmp_path: Path):
    plain = Pair("p", Text("c"), Text("r"))
    save_pairs(tmp_path / "pairs.jsonl", [PAIR, plain])
    assert load_pairs(tmp_path / "pairs.jsonl") == [PAIR, plain]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("rejected", [None, Text("r", (7, 8), True)])
def test_benign_rows_and_chats_survive_their_file(rejected: Text | None, chat: bool, tmp_path: Path):
    rows = [Pair("p", Text("c", (5,)), rejected, chat=chat, kind="benign"), replace(PAIR, chat=chat)]
    save_pairs(tmp_path / "pairs.jsonl", rows)
    assert load_pairs(tmp_path / "pairs.jsonl") == rows


def test_a_users_rows_need_three_strings(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r", "id": 7}\n')
    assert load_pairs(tmp_path / "p.jsonl") == [Pair("p", Text("c", ended=True), Text("r", ended=True))]


@pytest.mark.parametrize("row", [{}, {"rejected": None}, {"rejected": None, "chat": None}])
def test_a_users_benign_row_may_do_without_rejected(row: dict):
    pair = parse_pair({"prompt": "p", "chosen": "c", "benign": True} | row, "row 1")
    assert pair == Pair("p", Text("c", ended=True), None, kind="benign")


@pytest.mark.parametrize(
    ("value", "ended"),
    [
        ("c", True),
        ({"text": "c"}, True),
        ({"text": "c", "ended": None}, True),
        ({"text": "c", "ended": True}, True),
        ({"text": "c", "ended": False}, False),
        ({"text": "c", "tokens": [99], "ended": False}, False),
    ],
)
def test_a_users_completion_is_complete_unless_it_says_otherwise(value: object, ended: bool):
    """So that both stages learn where it ends."""
    pair = parse_pair({"prompt": "p", "chosen": value, "rejected": "r"}, "row 1")
    assert pair.chosen.ended is ended
    assert encoded(pair, 0).item.completions == ((99, 0) if ended else (99,), (114, 0))


def refused(folder: Path, row: dict, where: str = "row 2") -> str:
    """What is said of a file whose second row this is."""
    (folder / "p.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n")
    with pytest.raises(PolicyPatchError, match=rf"p\.jsonl, {where}") as caught:
        load_pairs(folder / "p.jsonl")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, ["field chosen"]),
        ({"rejected": ""}, ["field rejected"]),
        ({"rejected": " \n"}, ["field rejected"]),
        ({"rejected": None}, ["field rejected"]),  # only a benign row may do without
        ({"rejected": None, "benign": False}, ["field rejected"]),
        ({"rejected": "", "benign": True}, ["field rejected"]),
        ({"chosen": "", "rejected": None, "benign": True}, ["field chosen"]),
        ({"chosen": ["c"]}, ["field chosen"]),
        ({"chosen": {"txt": "c"}}, ["field chosen"]),
        ({"chosen": {"text": "c", "tokens": "no"}}, ["field chosen", "tokens"]),
        ({"chosen": {"text": "c", "tokens": []}}, ["field chosen", "tokens"]),
        ({"chosen": {"text": "c", "tokens": [True]}}, ["field chosen", "tokens"]),
        ({"chosen": {"text": "c", "ended": "no"}}, ["field chosen", "ended"]),
        ({"prompt": ""}, ["empty prompt"]),
        ({"prompt": 3}, ["empty prompt"]),
        ({"benign": "yes"}, ["benign must be true or false"]),
        ({"benign": 1}, ["benign must be true or false"]),
        ({"chat": "no"}, ["chat must be true or false"]),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict, words: list[str]):
    message = refused(tmp_path, GOOD | change)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_missing_field_is_named(tmp_path: Path, field: str):
    row = {name: value for name, value in GOOD.items() if name != field}
    assert f"row 2 has no field '{field}'" in refused(tmp_path, row)


@pytest.mark.parametrize("field", ["prompt", "chosen"])
def test_a_benign_row_needs_the_other_two(tmp_path: Path, field: str):
    row = {name: value for name, value in GOOD.items() if name not in (field, "rejected")}
    assert f"row 2 has no field '{field}'" in refused(tmp_path, row | {"benign": True})


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def encode_prompt(text: str, form: Form) -> list[int]:
    """A chat template of two tokens before and one after."""
    assert form in (PLAIN, CHAT)
    return [1, 2, *encode(text), 3] if form.chat else encode(text)


def encoded(pair: Pair, eos: int | None, prompt: int = 10, completion: int = 10) -> Example:
    return encode_pair(pair, encode_prompt, encode, eos, prompt, completion)


def test_encoding_keeps_the_end_of_a_prompt_and_the_beginning_of_a_completion():
    item = encoded(Pair("abcdef", Text("ghi"), Text("jklmno")), None, 4, 5).item
    assert item.prompt == tuple(b"cdef")
    assert item.completions == (tuple(b"ghi"), tuple(b"jklmn"))


def test_the_tokens_drawn_are_taken_rather_than_the_text_tokenised_again():
    assert encoded(PAIR, 0, 100, 100).item.completions == ((5, 6, 0), (7,))


def test_only_a_completion_that_ended_itself_gets_the_end_token_and_only_where_it_has_room():
    ended, open_end = Text("abc", None, True), Text("abc", None, False)
    for limit, tokens in ((4, (97, 98, 99, 0)), (3, (97, 98, 99)), (2, (97, 98))):
        item = encoded(Pair("p", ended, open_end), 0, 10, limit).item
        assert item.completions == (tokens, (97, 98, 99)[:limit])
    assert encoded(Pair("p", ended, open_end), None, 10, 9).item.completions[0] == (97, 98, 99)


def test_a_row_without_rejected_has_one_completion():
    assert encoded(Pair("ab", Text("c"), None, kind="benign"), None) == Example(Item((97, 98), ((99,),)), "benign")


def test_a_chat_is_written_by_the_template_and_never_cut():
    """Five tokens: two of the template before the two of the request and one behind."""
    request = Pair("ab", Text("c"), Text("d"), chat=True)
    assert encoded(request, None, 5).item.prompt == (1, 2, 97, 98, 3)
    with pytest.raises(PolicyPatchError) as caught:
        encoded(request, None, 4)
    message = str(caught.value)
    assert "5 tokens" in message and "data.max_prompt_tokens (4)" in message and "cannot be cut" in message
    assert "\n" not in message
    # The same text to continue loses its beginning.
    assert encoded(replace(request, prompt="abcdef", chat=False), None, 4).item.prompt == tuple(b"cdef")
