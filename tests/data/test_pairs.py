"""Which candidates make a pair, worked out by hand; pairs as files; pairs as tokens."""

import json
from pathlib import Path

import numpy as np
import pytest

from policypatch.data.datamodule import encode_pair
from policypatch.data.pairs import Pair, PairFilter, Text, choose_pairs, load_pairs, parse_pair, save_pairs
from policypatch.errors import PolicyPatchError

# Scores of six candidates. Ascending: 3 (0.05), 0 (0.10), 4 (0.18), 1 (0.45), 5 (0.62), 2 (0.90).
SCORES = np.array([[0.10, 0.45, 0.90, 0.05, 0.18, 0.62]])
LONG = np.full(6, 10)
FRESH = np.zeros(6)


def chosen(rule: PairFilter, scores=SCORES, lengths=LONG, repetition=FRESH) -> list[tuple[int, int]]:
    return choose_pairs(scores, lengths, repetition, rule)


def test_the_safest_and_the_most_toxic_make_the_pair():
    assert chosen(PairFilter()) == [(3, 2)]


def test_further_pairs_take_the_next_of_either_side():
    """Chosen side in order: 3, 0, 4 (at most 0.2). Rejected side: 2, 5 (at least 0.5). So two pairs, not three."""
    assert chosen(PairFilter(per_prompt=2)) == [(3, 2), (0, 5)]
    assert chosen(PairFilter(per_prompt=9)) == [(3, 2), (0, 5)]


def test_margin_is_inclusive_and_counts_per_pair():
    """0.9 - 0.05 = 0.85; the second pair has 0.62 - 0.10 = 0.52."""
    assert chosen(PairFilter(per_prompt=2, margin=0.52 - 1e-9)) == [(3, 2), (0, 5)]
    assert chosen(PairFilter(per_prompt=2, margin=0.6)) == [(3, 2)]
    assert chosen(PairFilter(margin=0.86)) == []
    halves = np.array([[0.25, 0.75]])
    assert choose_pairs(halves, LONG[:2], FRESH[:2], PairFilter(margin=0.5, chosen_at_most=0.25)) == [(0, 1)]


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
    assert choose_pairs(scores, LONG[:4], FRESH[:4], PairFilter(per_prompt=2)) == [(0, 1), (2, 3)]


def test_a_candidate_is_not_paired_with_itself():
    """Thresholds that overlap: 0.5 is both safe enough and toxic enough."""
    rule = PairFilter(margin=0, chosen_at_most=0.6, rejected_at_least=0.4)
    assert choose_pairs(np.array([[0.5]]), LONG[:1], FRESH[:1], rule) == []


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


PAIR = Pair("A prompt", Text(" fine", (5, 6), True), Text(" fou\u2028l", (7,)), 0.1, 0.9)


def test_pairs_survive_their_file(tmp_path: Path):
    plain = Pair("p", Text("c"), Text("r"))
    save_pairs(tmp_path / "pairs.jsonl", [PAIR, plain])
    assert load_pairs(tmp_path / "pairs.jsonl") == [PAIR, plain]


def test_a_users_rows_need_three_strings(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r", "id": 7}\n')
    assert load_pairs(tmp_path / "p.jsonl") == [Pair("p", Text("c", ended=True), Text("r", ended=True))]


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
    item = encode_pair(pair, encode, encode, 0, 10, 10)
    assert item.completions == ((99, 0) if ended else (99,), (114, 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, ["field chosen"]),
        ({"rejected": ""}, ["field rejected"]),
        ({"rejected": " \n"}, ["field rejected"]),
        ({"chosen": ["c"]}, ["field chosen"]),
        ({"chosen": {"txt": "c"}}, ["field chosen"]),
        ({"chosen": {"text": "c", "tokens": "no"}}, ["field chosen", "tokens"]),
        ({"chosen": {"text": "c", "tokens": []}}, ["field chosen", "tokens"]),
        ({"chosen": {"text": "c", "ended": "no"}}, ["field chosen", "ended"]),
        ({"prompt": ""}, ["empty prompt"]),
        ({"prompt": 3}, ["empty prompt"]),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict, words: list[str]):
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(good)}\n\n{json.dumps(good | change)}\n")
    with pytest.raises(PolicyPatchError, match=r"p\.jsonl, row 2") as caught:
        load_pairs(tmp_path / "p.jsonl")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_missing_field_is_named(tmp_path: Path, field: str):
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    del row[field]
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(PolicyPatchError, match=rf"row 1 has no field '{field}'"):
        load_pairs(tmp_path / "p.jsonl")


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_encoding_keeps_the_end_of_a_prompt_and_the_beginning_of_a_completion():
    item = encode_pair(Pair("abcdef", Text("ghi"), Text("jklmno")), encode, encode, None, 4, 5)
    assert item.prompt == tuple(b"cdef")
    assert item.completions == (tuple(b"ghi"), tuple(b"jklmn"))


def test_the_tokens_drawn_are_taken_rather_than_the_text_tokenised_again():
    item = encode_pair(PAIR, encode, encode, 0, 100, 100)
    assert item.completions == ((5, 6, 0), (7,))


def test_only_a_completion_that_ended_itself_gets_the_end_token_and_only_where_it_has_room():
    ended, open_end = Text("abc", None, True), Text("abc", None, False)
    for limit, tokens in ((4, (97, 98, 99, 0)), (3, (97, 98, 99)), (2, (97, 98))):
        item = encode_pair(Pair("p", ended, open_end), encode, encode, 0, 10, limit)
        assert item.completions == (tokens, (97, 98, 99)[:limit])
    assert encode_pair(Pair("p", ended, open_end), encode, encode, None, 10, 9).completions[0] == (97, 98, 99)
