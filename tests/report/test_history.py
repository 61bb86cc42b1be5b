"""The history of audits: what is added, what is refused, and that the drawing shows it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from policypatch.errors import PolicyPatchError
from policypatch.report import history
from policypatch.report.history import append, read


def entry(month: int, value: float) -> dict:
    place = {"risk": "toxicity", "split": "rtp", "metric": "toxic_rate", "judge": "svm", "n": 50}
    rows = [
        place | {"arm": arm, "value": v, "low": max(0, v - 0.1), "high": v + 0.1}
        for arm, v in (("base", 0.4), ("stack", value))
    ]
    return {"when": f"2026-{month:02}-01T00:00:00+00:00", "patch": [{"name": "tox"}], "rows": rows}


def test_entries_are_added_and_drawn(tmp_path: Path):
    path = tmp_path / "audits.jsonl"
    for month in (1, 2, 3):
        assert len(append(path, entry(month, 0.1 * month))) == month
    assert [found["when"][:7] for found in read(path)] == ["2026-01", "2026-02", "2026-03"]
    drawing = (tmp_path / "audits.svg").read_text()
    assert "toxic rate" in drawing and "rtp by svm" in drawing and "patch" in drawing


def test_no_file_has_no_entries(tmp_path: Path):
    assert read(tmp_path / "none.jsonl") == []


def test_a_row_that_is_no_entry_is_named_and_the_file_stays(tmp_path: Path):
    path = tmp_path / "audits.jsonl"
    path.write_text(json.dumps(entry(1, 0.1)) + "\n" + json.dumps({"when": "2026"}) + "\n")
    before = path.read_bytes()
    with pytest.raises(PolicyPatchError, match=r"audits\.jsonl, row 2: .* no patch"):
        append(path, entry(2, 0.1))
    assert path.read_bytes() == before


def test_audits_that_end_at_once_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each reads what is there and writes it again with its own line: two at once would lose one."""
    monkeypatch.setattr(history, "draw", lambda *_: time.sleep(0.02))
    path = tmp_path / "new" / "audits.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda month: append(path, entry(month, 0.1)), range(1, 9)))
    assert sorted(found["when"][5:7] for found in read(path)) == [f"{month:02}" for month in range(1, 9)]
