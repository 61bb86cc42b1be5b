"""A journal keeps what was whole when its writer was killed, and nothing else."""

from pathlib import Path

import pytest

from policypatch.files.journal import Journal

ROWS = [[1, [2, 3]], {"a": "\u00e4"}, []]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "new" / "journal")
    assert journal.rows == []
    for row in ROWS:
        journal.add(row)
    return tmp_path / "new" / "journal"  # not closed: killed


def test_rows_come_back(path: Path):
    assert Journal(path).rows == ROWS


@pytest.mark.parametrize("lost", [1, 5, 20])
def test_a_torn_line_does_not_count_and_is_written_over(path: Path, lost: int):
    path.write_bytes(path.read_bytes()[:-lost])
    journal = Journal(path)
    assert journal.rows == ROWS[:2]
    journal.add("new")
    journal.close()
    assert Journal(path).rows == [*ROWS[:2], "new"]


def test_what_a_disk_has_damaged_ends_it(path: Path):
    content = bytearray(path.read_bytes())
    content[content.index(b"\n") + 20] ^= 1  # within the second line
    path.write_bytes(content)
    assert Journal(path).rows == ROWS[:1]
