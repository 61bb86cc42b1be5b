"""What the cache holds, and its cleaning."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from policypatch.files.atomic import TEMPORARY, leftovers, remove
from policypatch.files.cache import ABOUT, BEGUN, begun_of, cache_root


def usage() -> list[tuple[str, int, int]]:
    """Each kind in the cache with its number of entries and its bytes, unfinished ones counted as bytes."""
    rows = []
    for kind in _kinds():
        entries = sum(1 for path in kind.iterdir() if _is_entry(path))
        rows.append((kind.name, entries, _size([kind])))
    return rows


def clean(kind: str | None = None, older_than_days: float | None = None) -> int:
    """Remove entries (of one kind; last used longer ago than that) and say how many bytes were freed.

    What killed runs left behind goes too. An entry that another run is making is left alone; one that a run has found
    and is about to read is not, so what runs that go on may use has to be told by its age.
    """
    limit = None if older_than_days is None else time.time() - older_than_days * 86400
    freed = 0
    for folder in _kinds():
        if kind is not None and folder.name != kind:
            continue
        # Entries, and the targets of unfinished ones: each is removed under its own lock.
        names = {path.name for path in folder.iterdir() if _is_entry(path)}
        names |= {path.name.split("-", 2)[-1] for path in folder.glob(f"{TEMPORARY}*")}
        names |= {path.name.removeprefix(BEGUN).rsplit("-", 2)[0] for path in folder.glob(f"{BEGUN}*")}
        for name in sorted(names):
            freed += _clean_entry(folder / name, limit)
    return freed


def _clean_entry(target: Path, limit: float | None) -> int:
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return 0
    try:
        doomed = [*leftovers(target), *begun_of(target)]  # nobody holds the lock, so nobody is writing them
        if target.exists() and (limit is None or _last_used(target) < limit):
            doomed.append(target)
        freed = _size(doomed)
        for path in doomed:
            remove(path)
        return freed
    finally:
        lock.release()


def _kinds() -> list[Path]:
    root = cache_root()
    return sorted(p for p in root.iterdir() if p.is_dir() and _is_entry(p)) if root.is_dir() else []


def _is_entry(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _last_used(folder: Path) -> float:
    about = folder / ABOUT
    return (about if about.exists() else folder).stat().st_mtime


def _size(paths: Sequence[Path]) -> int:
    total = 0
    for path in paths:
        within = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        for file in within if path.is_dir() else [path]:
            with suppress(OSError):  # it may vanish under another run's hands, as folders may, which walk leaves out
                total += file.lstat().st_size
    return total
