"""Prompts from files: which part of a text, which texts, and what is said of a file that cannot be read."""

import json
from pathlib import Path

import pytest

from policypatch.data.prompts import PromptSet, normalise, read_rows
from policypatch.errors import PolicyPatchError


@pytest.fixture
def text_file(tmp_path: Path):
    def write(*lines: str, name: str = "prompts.txt") -> str:
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return str(tmp_path / name)

    return write


def rows_file(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_text_files_hold_one_prompt_a_line(text_file):
    assert PromptSet(text_file("  one ", "", "two three", "   ")).load("risk.train") == ["one", "two three"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert PromptSet(str(tmp_path / "p.txt")).load("k") == ["one", "two"]


def test_a_line_separator_inside_a_text_does_not_cut_it(text_file):
    assert PromptSet(text_file("one\u2028still one")).load("k") == ["one\u2028still one"]


def test_rows_have_their_text_in_a_named_field(tmp_path: Path):
    source = rows_file(tmp_path / "p.jsonl", {"prompt": "one", "text": "no"}, {"prompt": "two"})
    assert PromptSet(source, field="prompt").load("k") == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "half"),
    [("one", "one"), ("one two", "one"), ("one two three", "one"), ("a  b\tc d e", "a b"), ("a b c d e f", "a b c")],
)
def test_first_half_is_half_of_the_words_rounded_down_at_least_one(text_file, text: str, half: str):
    assert PromptSet(text_file(text), take="first_half").load("k") == [half]


def test_equal_prompts_stand_once_where_they_came_first(text_file):
    assert PromptSet(text_file("b", "a", "b", "c", "a")).load("k") == ["b", "a", "c"]
    source = text_file("one two three four", "one two five six")
    assert PromptSet(source, take="first_half").load("k") == ["one two"]


def test_texts_of_the_evaluation_set_are_left_out_by_their_full_text(text_file):
    """Case, punctuation and spaces do not tell texts apart, and the whole text decides, not its half."""
    source = text_file("The cat, sat on THE mat!", "The cat sat somewhere else today")
    prompts = PromptSet(source, take="first_half").load("k", without=["the cat sat on the mat"])
    assert prompts == ["The cat sat"]


def test_a_half_that_is_itself_an_evaluation_prompt_is_left_out(text_file):
    source = text_file("one two three four", "five six seven eight")
    assert PromptSet(source, take="first_half").load("k", without=["One two."]) == ["five six"]


def test_normalise_keeps_letters_and_digits_of_any_script():
    assert normalise("  Ça, c'est   2 €! ") == "ça c est 2"


def test_limit_is_a_draw_that_the_seed_fixes_and_keeps_the_order(text_file):
    source = text_file(*(f"p{i:03d}" for i in range(100)))
    one = PromptSet(source, limit=10, seed=1).load("k")
    assert one == PromptSet(source, limit=10, seed=1).load("k") == sorted(one)
    assert len(set(one)) == 10
    assert one != PromptSet(source, limit=10, seed=2).load("k")
    assert len(PromptSet(source, limit=1000).load("k")) == 100


def test_limit_counts_distinct_prompts(text_file):
    assert len(PromptSet(text_file("a", "a", "a", "b", "c"), limit=3).load("k")) == 3


def test_several_files_are_read_in_the_order_of_their_names(text_file, tmp_path: Path):
    text_file("late", name="b.txt")
    text_file("early", name="a.txt")
    assert PromptSet(str(tmp_path / "*.txt")).load("k") == ["early", "late"]


def refuses(prompts: PromptSet, *words: str, without: tuple[str, ...] = ()) -> None:
    with pytest.raises(PolicyPatchError) as caught:
        prompts.load("risk.train", without)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_names_the_key(tmp_path: Path):
    refuses(PromptSet("/nope.jsonl"), "risk.train.source", "/nope.jsonl")


def test_bytes_that_are_not_utf8(tmp_path: Path):
    (tmp_path / "p.txt").write_bytes(b"good\n\xff\xfe bad\n")
    refuses(PromptSet(str(tmp_path / "p.txt")), "p.txt", "UTF-8")
    (tmp_path / "p.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    refuses(PromptSet(str(tmp_path / "p.jsonl")), "p.jsonl, row 2", "UTF-8")


@pytest.mark.parametrize("row", [{"body": "x"}, {"text": ""}, {"text": "  "}, {"text": None}, {"text": 3}])
def test_a_row_without_text_is_named(tmp_path: Path, row: dict):
    source = rows_file(tmp_path / "p.jsonl", {"text": "good"}, row)
    refuses(PromptSet(source), "p.jsonl, row 2", "'text'")


def test_an_empty_file(text_file, tmp_path: Path):
    refuses(PromptSet(text_file()), "risk.train.source", "is empty")
    (tmp_path / "p.jsonl").touch()
    refuses(PromptSet(str(tmp_path / "p.jsonl")), "p.jsonl", "empty")


def test_a_folder_is_no_prompt_file(tmp_path: Path):
    refuses(PromptSet(str(tmp_path)), str(tmp_path))


def test_nothing_left_beside_the_evaluation_set(text_file):
    refuses(PromptSet(text_file("one")), "evaluation set", without=("One",))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("take", "half", "all or first_half"),
        ("take", None, "all or first_half"),
        ("limit", 0, "whole number, at least 1, or null"),
        ("limit", 2.0, "whole number"),
        ("limit", "ten", "whole number"),
        ("limit", True, "whole number"),
    ],
)
def test_values_that_no_config_may_have(field: str, value: object, allowed: str):
    with pytest.raises(PolicyPatchError, match=f"^{field} is {value!r}: .*{allowed}"):
        PromptSet("/any.txt", **{field: value})


def test_what_an_expression_matches_is_removed_from_every_text(text_file):
    """As WinoBias is written: a row number, and brackets around who is meant."""
    prompts = PromptSet(text_file("1 [The cook] met the clerk.", "22 The cook", "[[]]"), remove=r"^\d+ |[\[\]]")
    assert prompts.load("k") == ["The cook met the clerk.", "The cook"]
    assert prompts.all_texts("k") == ["The cook met the clerk.", "The cook", ""]


def test_a_prompt_is_what_stands_before_the_first_match(text_file):
    """A text without a match is left out, and so is one that begins with it; equal beginnings stand once."""
    lines = ("The cook said that he and she left.", "No pronoun here.", "She left.", "The cook said that she left.")
    prompts = PromptSet(text_file(*lines), before=r"\b([Ss]?he)\b")
    assert prompts.load("k") == ["The cook said that"]
    assert prompts.all_texts("k") == list(lines)
    assert PromptSet(text_file(*lines), before=r"\bhe\b", take="first_half").load("k") == ["The cook"]


def test_what_an_expression_matches_is_rephrased(text_file):
    """Once in a prompt; texts are compared with those that are measured on as they were."""
    how = {"pattern": r"^.*?\bhow to (.*?)\.?$", "into": r"How can I \1?"}
    file = text_file("Explain how to win and how to lose.", "Write a poem.", "Show how to win and how to lose")
    prompts = PromptSet(file, rephrase=how)
    assert prompts.load("k") == ["How can I win and how to lose?", "Write a poem."]
    without = ["explain how to win and how to lose"]
    assert prompts.load("k", without=without) == ["Write a poem.", "How can I win and how to lose?"]
    assert prompts.load("k", without=["How can I win and how to lose?"]) == ["Write a poem."]


def test_what_rephrasing_brings_near_to_an_evaluation_prompt_is_left_out(text_file):
    """What an order says besides makes it less alike than the question that is made of it."""
    file = text_file("Provide detailed step-by-step guidance explaining how to forge banknotes", "Bake bread with rye")
    how = {"pattern": "^.*how to (.*)$", "into": r"How can I \1?"}
    measured = ["How could anyone forge banknotes?"]
    assert len(PromptSet(file).load("k", measured, near=0.5)) == 2
    assert PromptSet(file, rephrase=how).load("k", measured, near=0.5) == ["Bake bread with rye"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("how to", "give a pattern and what it becomes"),
        ({"pattern": "how to"}, "give a pattern and what it becomes"),
        ({"pattern": "how to (", "into": "a"}, "rephrase.pattern is 'how to .*no regular expression"),
        ({"pattern": "how to", "into": r"\1"}, "rephrase.into .* does not fit the pattern"),
    ],
)
def test_what_cannot_be_rephrased_so(value: object, told: str):
    with pytest.raises(PolicyPatchError, match=told):
        PromptSet("/any.txt", rephrase=value)


def test_an_evaluation_text_is_left_out_before_it_is_cut(text_file):
    prompts = PromptSet(text_file("The cook said he left.", "The clerk said he left."), before=r"\bhe\b")
    assert prompts.load("k", without=["the cook said he left"]) == ["The clerk said"]


def test_rows_of_a_table_are_chosen(tmp_path: Path):
    (tmp_path / "p.csv").write_text("text,kind\none,a\ntwo,b\none,b\n")
    prompts = PromptSet(str(tmp_path / "p.csv"), where={"kind": "b"})
    assert prompts.load("k") == ["two", "one"]
    assert read_rows(str(tmp_path / "p.csv"), "k")[0] == ("one", {"text": "one", "kind": "a"})


def test_near_duplicates_of_the_evaluation_set_are_left_out_where_asked(text_file):
    source = text_file("Name three uses for an old ladder, please", "Name three rivers")
    evaluation = ["Name three uses for old ladders"]
    assert len(PromptSet(source).load("k", without=evaluation)) == 2
    assert PromptSet(source).load("k", without=evaluation, near=0.6) == ["Name three rivers"]


def test_why_there_is_no_prompt_is_said(text_file, tmp_path: Path):
    refuses(PromptSet(text_file("one"), before="x"), "risk.train", "'x'", "before")
    (tmp_path / "p.csv").write_text("text,kind\none,a\n")
    refuses(PromptSet(str(tmp_path / "p.csv"), where={"kind": "b"}), "risk.train", "{'kind': 'b'}")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("remove", "(", "no regular expression"),
        ("before", "[a", "no regular expression"),
        ("before", "", "a regular expression or null"),
        ("remove", 3, "a regular expression or null"),
        ("where", "kind", "one value for each field"),
        ("where", {"kind": ["a", "b"]}, "one value for each field"),
        ("where", {"kind": None}, "one value for each field"),
    ],
)
def test_expressions_and_choices_that_no_config_may_have(field: str, value: object, allowed: str):
    with pytest.raises(PolicyPatchError, match=f"^{field} is .*{allowed}"):
        PromptSet("/any.txt", **{field: value})


# --- portions -------------------------------------------------------------------------------------------------------


def test_portions_that_do_not_overlap_share_no_text_and_leave_none_out(text_file):
    texts = [f"text number {i}" for i in range(2000)]
    source = text_file(*texts)
    parts = [PromptSet(source, portion=p).load("k") for p in ([0.0, 0.1], [0.1, 0.5], [0.5, 1.0])]
    assert sorted(t for part in parts for t in part) == sorted(texts)
    # A share of 2,000 coins has a standard deviation of at most 0.011.
    assert [len(part) / 2000 for part in parts] == pytest.approx([0.1, 0.4, 0.5], abs=0.04)


def test_a_portion_is_told_by_the_text_alone(text_file):
    """Neither order nor neighbours, case nor punctuation decide where a text stands."""
    texts = [f"text number {i}" for i in range(50)]
    kept = PromptSet(text_file(*texts), portion=[0.0, 0.5]).load("k")
    again = PromptSet(text_file(*[t.upper() + "!" for t in reversed(texts[:20])], name="b.txt"), portion=[0.0, 0.5])
    assert sorted(normalise(t) for t in again.load("k")) == sorted(t for t in kept if t in texts[:20])


@pytest.mark.parametrize("portion", [[0.5], [0.5, 0.5], [-0.1, 1], [0, 1.1], "ab", [False, True], 0.5])
def test_a_portion_that_is_none_is_refused(portion, text_file):
    with pytest.raises(PolicyPatchError, match=r"portion is .*two numbers"):
        PromptSet(text_file("one"), portion=portion)


def test_an_empty_portion_is_told(text_file):
    with pytest.raises(PolicyPatchError, match=r"k has no prompts: no text of its source lies in portion"):
        PromptSet(text_file("one"), portion=[0.0, 1e-9]).load("k")


def test_a_text_that_begins_with_a_measured_one_is_left_out_where_asked_for(text_file):
    made = PromptSet(text_file("The map is old and torn.", "The mapmaker is old.", "An old map"))
    assert len(made.load("k", without=["The map is OLD"])) == 3
    assert made.load("k", without=["The map is OLD"], begun=True) == ["The mapmaker is old.", "An old map"]
