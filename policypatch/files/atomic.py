"""Files that are either whole or not there: written beside their place, then renamed into it.

Of several ranks the first alone writes; what the others make is thrown away.

Also the two readers (JSON, JSON lines) and the digest that the rest of the project uses, so that every
mistake in a file is told the same way: the file's name, and the row's number.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from policypatch import ranks
from policypatch.errors import PolicyPatchError
from policypatch.files.disk import written

BOM = b"\xef\xbb\xbf"  # some editors put it in front
TEMPORARY = ".tmp-"


def temporary_name(target: Path) -> Path:
    """A fresh hidden sibling of `target`; it ends in the target's own name, so that suffixes still count."""
    return target.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{target.name}")


def leftovers(target: Path) -> list[Path]:
    """What writers of `target` left beside it when they were killed (no `finally` runs after SIGKILL)."""
    length = len(TEMPORARY) + 12 + 1
    return [p for p in target.parent.glob(f"{TEMPORARY}*") if p.name[length:] == target.name]


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path in `target`'s folder, which becomes `target` when the body succeeds.

    Missing parent folders are made. When the body raises, the temporary file is removed and `target` keeps
    what it held. Raises FileNotFoundError when the body wrote nothing.
    """
    target = Path(target)
    if not ranks.first():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere, target.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        with written(target):
            yield temporary
            _fsync(temporary)
            temporary.replace(target)
            _fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `target`, which becomes `target` when the body succeeds.

    An old `target` stays until the new one is complete, and comes back if the last step fails. When the body
    raises, the temporary folder is removed.
    """
    target = Path(target)
    if not ranks.first():
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        with written(target):
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            _move_over(temporary, target)
            _fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_over(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; what is in the way steps aside first, as no rename swaps two."""
    try:
        folder.rename(target)  # also replaces an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    aside = temporary_name(target)
    target.rename(aside)
    try:
        folder.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON, keys in their own order. Raises ValueError for NaN or infinity."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_encode(obj, indent=2) + b"\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line. Raises ValueError for NaN or infinity."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for row in rows:
            file.write(_encode(row) + b"\n")


def read_json(path: Path) -> Any:
    """Read one JSON file. Raises PolicyPatchError when it is missing, empty, not UTF-8 or not JSON."""
    return parse_json(_read(path), path)


def parse_json(content: bytes, path: Path) -> Any:
    """What a file with this content says, as `read_json`."""
    if not content.strip():
        raise PolicyPatchError(f"{path} is empty")
    try:
        return _decode(content.removeprefix(BOM))
    except ValueError as error:
        raise PolicyPatchError(f"{path} is not valid JSON: {error}") from error


def has_own(folder: Path, name: str) -> bool:
    """Whether a folder that may have come from anywhere has this file.

    Raises:
        PolicyPatchError: a pipe or a device, which reading might never end; or a link that leads out of the folder,
            but for the hub cache's own, whose files are links into `blobs`.
    """
    path = folder / name
    if not os.path.lexists(path):
        return False
    try:
        real, inside = path.resolve(), folder.resolve()
    except RuntimeError as error:  # of Python before 3.13
        raise PolicyPatchError(f"{path} is a link that leads to itself") from error
    blobs = inside.parent.parent / "blobs"  # models--OWNER--NAME/snapshots/REVISION/FILE -> ../../blobs/DIGEST
    of_hub = inside.parent.name == "snapshots" and real.parent == blobs
    if not real.is_relative_to(inside) and not of_hub:
        raise PolicyPatchError(f"{path} is a link that leads out of its folder: put the file itself there")
    if not real.is_file():
        raise PolicyPatchError(f"{path} is no file")
    return True


def read_limited(path: Path | str, most: int) -> bytes:
    """The bytes of a file that may have come from anywhere. Raises PolicyPatchError when there are more than `most`."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise PolicyPatchError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) > most:
        raise PolicyPatchError(f"{path} has more than {most:,} bytes: that is no file of this kind")
    return content


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; see `numbered_jsonl`."""
    return [row for _, row in numbered_jsonl(path)]


def numbered_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read one JSON object a line, each with its line's number (from 1); blank lines are skipped.

    Raises PolicyPatchError that names the file, and the row (its line's number) that is not UTF-8, not JSON or not an
    object; also when the file is missing or holds no row.
    """
    rows = []
    # On "\n" alone: str.splitlines also cuts at U+2028 and its like, which JSON allows inside a string.
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _decode(line)
        except ValueError as error:
            raise PolicyPatchError(f"{path}, row {number}: {error}") from error
        if not isinstance(row, dict):
            raise PolicyPatchError(f"{path}, row {number}: expected an object, found {type(row).__name__}")
        rows.append((number, row))
    if not rows:
        raise PolicyPatchError(f"{path} is empty: expected one JSON object a line")
    return rows


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> bytes:
    try:
        return Path(path).read_bytes().removeprefix(BOM)
    except OSError as error:
        raise PolicyPatchError(f"cannot read {path}: {error.strerror or error}") from error


def _encode(obj: Any, indent: int | None = None) -> bytes:
    try:
        return json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        # Half of a surrogate pair, as a model may write it: UTF-8 has no form for it, a JSON escape has.
        return json.dumps(obj, indent=indent, ensure_ascii=True, allow_nan=False).encode("ascii")


def _decode(content: bytes) -> Any:
    """Parse strict JSON; every failure is a ValueError with a sentence in it."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} is 0x{content[error.start]:02x})") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _fsync(path: Path) -> None:
    """Have the disk keep it before a rename refers to it; a rename alone may outlive the bytes in a crash."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
