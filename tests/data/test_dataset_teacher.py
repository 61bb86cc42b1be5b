"""Teacher `dataset`: rows of a file as pairs, under whatever names its fields have."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from policypatch.data.pairs import Pair, Text
from policypatch.data.teachers import DatasetTeacher
from policypatch.errors import PolicyPatchError

ROWS = [
    {"prompt": "one", "chosen": "kind", "rejected": "rude", "note": 1},
    {"prompt": "two", "chosen": "calm", "rejected": "foul", "note": 2},
]


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    return Pair(prompt, Text(chosen, ended=True), Text(rejected, ended=True))


PAIRS = [pair("one", "kind", "rude"), pair("two", "calm", "foul")]
NAMES = {"prompt": "question", "chosen": "safer", "rejected": "worse"}
RENAMED = [{NAMES.get(k, k): v for k, v in row.items()} for row in ROWS]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(source: object, **options: object) -> list[Pair]:
    return DatasetTeacher(source, **options).pairs(None).pairs


def test_jsonl_as_it_is(tmp_path: Path):
    assert pairs(jsonl(tmp_path / "p.jsonl", ROWS)) == PAIRS


def test_jsonl_with_other_names(tmp_path: Path):
    assert pairs(jsonl(tmp_path / "p.jsonl", RENAMED), fields=NAMES) == PAIRS


def test_names_may_be_exchanged(tmp_path: Path):
    swapped = pairs(jsonl(tmp_path / "p.jsonl", ROWS), fields={"chosen": "rejected", "rejected": "chosen"})
    assert swapped[0] == pair("one", "rude", "kind")


def test_parquet_as_the_hub_has_it(tmp_path: Path):
    for number, row in enumerate(RENAMED):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"train-0000{number}.parquet")
    assert pairs(str(tmp_path / "train-*.parquet"), fields=NAMES) == PAIRS


def test_csv(tmp_path: Path):
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\none,kind,rude\ntwo,calm,foul\n")
    assert pairs(str(tmp_path / "p.csv")) == PAIRS


BENIGN = {"prompt": "three", "chosen": "warm", "benign": True}


@pytest.mark.parametrize("row", [BENIGN, BENIGN | {"rejected": None}])
def test_a_benign_row_may_do_without_rejected(row: dict, tmp_path: Path):
    benign = Pair("three", Text("warm", ended=True), None, kind="benign")
    assert pairs(jsonl(tmp_path / "p.jsonl", [*ROWS, row])) == [*PAIRS, benign]
    renamed = [*RENAMED, {NAMES.get(k, k): v for k, v in row.items()}]
    assert pairs(jsonl(tmp_path / "r.jsonl", renamed), fields=NAMES) == [*PAIRS, benign]


def test_benign_rows_and_chats_of_a_table(tmp_path: Path):
    """A table has every column in every row; empty cells are None."""
    rows = [{**ROWS[0], "benign": False, "chat": None}, {**BENIGN, "rejected": None, "note": 3, "chat": True}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert pairs(str(tmp_path / "p.parquet")) == [
        PAIRS[0],
        Pair("three", Text("warm", ended=True), None, chat=True, kind="benign"),
    ]


def test_only_a_benign_row_may_do_without_rejected(tmp_path: Path):
    bare = {"prompt": "three", "chosen": "warm"}
    refuses(["p.jsonl, row 2", "'rejected'"], jsonl(tmp_path / "p.jsonl", [ROWS[0], bare]))
    refuses(["p.jsonl, row 2", "benign"], jsonl(tmp_path / "p.jsonl", [ROWS[0], BENIGN | {"benign": "yes"}]))


def test_limit_takes_the_first_rows(tmp_path: Path):
    source = jsonl(tmp_path / "p.jsonl", ROWS)
    assert pairs(source, limit=1) == PAIRS[:1]
    assert DatasetTeacher(source, limit=9).pairs(None).counts == {"rows": 2, "kept": 2}


def test_the_identity_is_the_content_not_the_place(tmp_path: Path):
    (tmp_path / "other").mkdir()
    here, there = jsonl(tmp_path / "p.jsonl", ROWS), jsonl(tmp_path / "other" / "p.jsonl", ROWS)
    assert DatasetTeacher(here).identity() == DatasetTeacher(there).identity()
    changed = jsonl(tmp_path / "other" / "p.jsonl", ROWS[:1])
    assert DatasetTeacher(here).identity() != DatasetTeacher(changed).identity()
    assert DatasetTeacher(here).identity() != DatasetTeacher(here, limit=1).identity()
    assert DatasetTeacher(here).identity() != DatasetTeacher(here, fields={"chosen": "rejected"}).identity()


def refuses(words: list[str], source: object, **options: object) -> None:
    with pytest.raises(PolicyPatchError) as caught:
        pairs(source, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_source():
    refuses(["teacher.source is not set"], None)


def test_a_missing_file():
    refuses(["teacher.source", "/nope.jsonl"], "/nope.jsonl")


def test_a_row_without_the_named_field(tmp_path: Path):
    source = jsonl(tmp_path / "p.jsonl", [RENAMED[0], ROWS[1]])
    refuses(["p.jsonl, row 2", "'question'", "teacher.fields"], source, fields=NAMES)
    table = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), table)
    refuses(["p.parquet, row 1", "'safer'", "teacher.fields"], str(table), fields={"chosen": "safer"})


def test_an_empty_side_is_named_by_its_row(tmp_path: Path):
    table = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist([ROWS[0], ROWS[1] | {"rejected": ""}]), table)
    refuses(["p.parquet, row 2", "rejected"], str(table))


def test_a_file_that_is_no_table(tmp_path: Path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    refuses(["teacher.source", "p.parquet", "parquet"], str(tmp_path / "p.parquet"))
    (tmp_path / "p.xlsx").touch()
    refuses(["teacher.source", "p.xlsx"], str(tmp_path / "p.xlsx"))


def test_values_that_no_config_may_have(tmp_path: Path):
    source = jsonl(tmp_path / "p.jsonl", ROWS)
    refuses(["teacher.limit is 0", "at least 1"], source, limit=0)
    refuses(["teacher.limit is 'ten'", "whole number"], source, limit="ten")
    refuses(["teacher.fields", "'chsen'"], source, fields={"chsen": "x"})


def test_rows_are_no_arm(tmp_path: Path):
    with pytest.raises(PolicyPatchError, match="ready rows"):
        DatasetTeacher(jsonl(tmp_path / "rows.jsonl", [])).arm("teacher")
