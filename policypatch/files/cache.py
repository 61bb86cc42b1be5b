"""The cache: what is costly to make is made once and shared by every run, also by runs side by side.

An entry is a folder `<root>/<kind>/<key>`, the key a digest of everything the content depends on, so an entry
is never stale. It appears whole or not at all. A hit is checked against the sizes and digests recorded in
its `about.json`; whatever does not match is made again. The root is `$POLICYPATCH_CACHE`, by default
`~/.cache/policypatch`.

What a model or a judge answers may depend on more than a key can hold (versions of packages, the machine, a service):
within an `occasion` such kinds (`MEASURED`) are made anew, and only what that occasion has made itself is shared.
"""

import hashlib
import json
import logging
import math
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, ListConfig, OmegaConf

from policypatch import ranks
from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import (
    atomic_folder,
    file_sha256,
    leftovers,
    read_json,
    remove,
    write_json,
)
from policypatch.files.disk import refuse_closed, told
from policypatch.files.journal import Journal

log = logging.getLogger(__name__)

ABOUT = "about.json"
BEGUN = ".begun-"
DIGEST_LIMIT = 64 * 2**20  # bytes; larger files are checked by size alone on a hit, to keep hits fast
MEASURED = frozenset(("completions", "judgements", "perplexity", "divergence", "text_nll", "word_mass"))
"""Kinds that say what a model or a judge answers."""
_OCCASION = "POLICYPATCH_OCCASION"  # in the environment, which ranks that are started inherit
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

_counters: dict[str, dict[str, int]] = {}
_counters_lock = threading.Lock()


def cache_root() -> Path:
    """The cache's folder; it need not exist yet."""
    return Path(os.environ.get("POLICYPATCH_CACHE") or "~/.cache/policypatch").expanduser().absolute()


@contextmanager
def occasion(name: str | None = None) -> Iterator[None]:
    """Have what is measured within be measured: entries of `MEASURED` kinds that were made outside do not count.

    Args:
        name: of the occasion; the same one finds again what it has made. One that no other has by default.
    """
    before = os.environ.get(_OCCASION)
    os.environ[_OCCASION] = name or uuid.uuid4().hex
    try:
        yield
    finally:
        os.environ.pop(_OCCASION)
        if before is not None:
            os.environ[_OCCASION] = before


def share_occasion() -> None:
    """Have all ranks be on the first one's occasion: a launcher's ranks have each begun one of their own."""
    first = ranks.gather(os.environ.get(_OCCASION))[0]
    if first is not None:
        os.environ[_OCCASION] = first


def _place(kind: str, key: str) -> Path:
    """Where an entry is, or will be."""
    if kind in MEASURED and (now := os.environ.get(_OCCASION)):
        key = content_key(key=key, occasion=now)
    return cache_root() / kind / key


def content_key(**parts: Any) -> str:
    """A key of 32 hex characters for everything an entry depends on.

    Takes nested dicts, lists, tuples (as lists), strings, finite numbers, booleans, None and OmegaConf
    containers. Raises TypeError for anything else: a path or an object is no content.
    """
    canonical = json.dumps(_plain(parts, "parts"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:32]


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        # JSON would write the keys 1 and "1" alike.
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{where}: a cache key needs string keys, not {odd[0]!r}")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where}: {value!r} ({type(value).__name__}) cannot be part of a cache key")


def entry(
    kind: str,
    key: str,
    build: Callable[[Path], None],
    about: Mapping[str, Any] | None = None,
    together: bool = False,
) -> Path:
    """The folder of the entry `kind/key`, made with `build(empty folder)` when it is absent or damaged.

    Of several ranks the first makes it, while the others wait.

    Args:
        kind: the folder of its like.
        key: see `content_key`.
        build: makes the content; it must not write `about.json`.
        about: kept in the entry's `about.json` for people who look into the cache.
        together: whether all ranks are to call `build`, which then shares the work out among them. What counts is what
            the first writes.

    Raises:
        ValueError: a `kind` or `key` that is no plain name.
        PolicyPatchError: the cache cannot be written, or is not one that all ranks see.
        Exception: what `build` raises (nothing is left behind then).
    """
    if not _NAME.fullmatch(kind) or not _NAME.fullmatch(key):
        raise ValueError(f"not a plain name: {kind!r} or {key!r}")
    folder = _place(kind, key)
    with ExitStack() as held:
        ready = ranks.once(lambda: _ready(folder, held))
        if not ready:
            log.info("cache miss %s/%s", kind, key)
            _count(kind, "misses")
            make = ranks.agree if together else ranks.once
            make(lambda: _make(folder, build, about))
        ranks.agree(lambda: _seen(folder))
    return _hit(folder) if ready else folder


def _ready(folder: Path, held: ExitStack) -> bool:
    """Whether an entry can be used. Where not, it has been cleared away, and its lock is in `held`."""
    # Without the lock: entries never change, and a cache that others filled may be read-only.
    if _damage(folder) is None:
        return True
    held.enter_context(_writable(folder))
    held.enter_context(_lock(folder))
    damage = _damage(folder)
    if damage is None:  # another run made it while this one waited
        return True
    if folder.exists():
        log.warning("cache entry %s/%s is damaged (%s), making it again", folder.parent.name, folder.name, damage)
        remove(folder)
    for path in leftovers(folder):
        remove(path)
    return False


def _make(folder: Path, build: Callable[[Path], None], about: Mapping[str, Any] | None) -> None:
    with atomic_folder(folder) as temporary:
        build(temporary)
        _describe(temporary, folder.parent.name, folder.name, about)
    _clear_begun(folder)


def _seen(folder: Path) -> None:
    """Refuse a cache of this machine's own, which what the first rank made on another is not in."""
    if not folder.is_dir():
        raise PolicyPatchError(
            f"rank {ranks.rank()} does not see {folder}, which the first rank has made: set POLICYPATCH_CACHE to a "
            "folder that all machines share"
        )


@contextmanager
def begun(kind: str, key: str, rows: range) -> Iterator[Journal]:
    """A journal of the entry `kind/key`, which goes once that is whole.

    Args:
        kind, key: see `entry`.
        rows: the share that it is of.
    """
    folder = _place(kind, key)
    journal = Journal(folder.with_name(f"{BEGUN}{folder.name}-{rows.start}-{rows.stop}"))
    if journal.rows:
        log.info("%s/%s was begun before, and is gone on with", kind, key)
    try:
        yield journal
    finally:
        journal.close()


def begun_of(folder: Path) -> list[Path]:
    """Journals of an entry."""
    return list(folder.parent.glob(f"{BEGUN}{folder.name}-*"))


def _hit(folder: Path) -> Path:
    kind = folder.parent.name
    log.info("cache hit %s/%s", kind, folder.name)
    _count(kind, "hits")
    with suppress(OSError):  # a shared cache may refuse
        os.utime(folder / ABOUT)  # the time of last use, for clean(older_than_days)
        _clear_begun(folder)  # of a run that was killed between the last rename and this
    return folder


def _clear_begun(folder: Path) -> None:
    """Remove the journals of an entry that is whole."""
    for path in begun_of(folder) if ranks.first() else ():
        path.unlink(missing_ok=True)


def _describe(folder: Path, kind: str, key: str, about: Mapping[str, Any] | None) -> None:
    """Write `about.json`: what was asked for, when, and the size and digest of every file."""
    if (folder / ABOUT).exists():
        raise ValueError(f"the builder of {kind}/{key} wrote {ABOUT}, which is the cache's own file")
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    parts = _plain(about or {}, "about")
    write_json(folder / ABOUT, {"kind": kind, "key": key, "created": created, "about": parts, "files": files})


def _damage(folder: Path) -> str | None:
    """What is wrong with an entry, in a few words; None when it can be used."""
    if not folder.is_dir():
        return "absent"
    try:
        for name, recorded in read_json(folder / ABOUT)["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != recorded["bytes"]:
                return f"{name} has another size"
            if recorded["bytes"] <= DIGEST_LIMIT and file_sha256(path) != recorded["sha256"]:
                return f"{name} has another digest"
    except (PolicyPatchError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"{ABOUT} or a file it names cannot be read: {error}"
    return None


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold an entry's lock. The system frees it when its holder dies, and the lock file stays (0 bytes)."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another run that is making %s/%s", folder.parent.name, folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Make the entry's parent, and tell a full or forbidden disk in a sentence."""
    refuse_closed(folder.parent, "the cache (POLICYPATCH_CACHE)")
    with told(folder.parent, "free some space, or set POLICYPATCH_CACHE to another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield


def _count(kind: str, what: str) -> None:
    with _counters_lock:
        _counters.setdefault(kind, {"hits": 0, "misses": 0})[what] += 1


def counters() -> dict[str, dict[str, int]]:
    """Hits and misses of this process by kind."""
    with _counters_lock:
        return {kind: dict(counts) for kind, counts in _counters.items()}


def reset_counters() -> None:
    """Count from zero again."""
    with _counters_lock:
        _counters.clear()
