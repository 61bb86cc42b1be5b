import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import (
    atomic_folder,
    atomic_path,
    file_sha256,
    leftovers,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "scores.json"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.suffix == ".json"  # writers that add a suffix to other names leave it alone
    assert target.read_text() == "half"
    assert names(target.parent) == ["scores.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_unwritable_value_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(ValueError):
        write_jsonl(tmp_path / "a.jsonl", [{"ok": 1}, {"loss": float("inf")}])
    assert names(tmp_path) == []


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_json_is_readable_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"z": 1, "a": "größer"})
    assert path.read_bytes() == '{\n  "z": 1,\n  "a": "größer"\n}\n'.encode()
    assert read_json(path) == {"z": 1, "a": "größer"}


@pytest.mark.parametrize("text", ["plain", "line\nbreak", "\u2028 and \x85", "half a pair \ud83d", "𝄞 \0 \t"])
def test_jsonl_round_trip(tmp_path: Path, text: str) -> None:
    rows = [{"text": text, "n": 1}, {"text": "", "n": None}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows


def test_jsonl_from_other_editors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')  # byte order mark, CRLF, no last newline
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"a": 1}\n{"a": \n', "row 2"),
        (b'{"a": 1}\n\n[1, 2]\n', "row 3: expected an object, found list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "row 2: not UTF-8 (byte 8 is 0xff)"),
        (b'{"a": NaN}\n', "row 1: NaN is not JSON"),
        (b"[" * 200_000 + b"\n", "row 1"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(PolicyPatchError) as error:
        read_jsonl(path)
    assert str(path) in str(error.value)
    assert complaint in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a": Infinity}'])
def test_a_broken_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(PolicyPatchError, match=r"broken\.json"):
        read_json(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_json, read_jsonl):
        with pytest.raises(PolicyPatchError, match=r"nowhere\.json.*No such file"):
            read(tmp_path / "nowhere.json")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "patch"
    for content in ("one", "two"):
        with atomic_folder(target) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / content).write_text(content)
    assert names(target / "sub") == ["two"]
    assert names(tmp_path) == ["patch"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "patch"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        (temporary / "b").write_text("new")
        raise RuntimeError
    assert names(target) == ["a"]
    assert names(tmp_path) == ["patch"]


def test_a_killed_writer_leaves_no_target_and_what_it_leaves_can_be_found(tmp_path: Path) -> None:
    target = tmp_path / "model"
    program = (
        "import sys, time; from pathlib import Path; from policypatch.files.atomic import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as t:\n"
        "    (t / 'a').write_text('half'); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(target)])
    deadline = time.monotonic() + 20
    while not any((p / "a").exists() for p in leftovers(target)) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert len(leftovers(target)) == 1
    assert leftovers(tmp_path / "other-model") == []


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
