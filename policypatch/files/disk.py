"""Disks that are full or may not be written, told in a sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from policypatch.errors import PolicyPatchError

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
PROBE = 65536  # bytes


@contextmanager
def told(place: Path, remedy: str) -> Iterator[None]:
    """Within the block, tell a full disk and one that may not be written as a user's affair.

    Args:
        place: what is written.
        remedy: what to do, a clause.

    Raises:
        PolicyPatchError: instead of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise PolicyPatchError(f"no room left on the disk of {place}: {remedy}") from error
        if error.errno in CLOSED:
            what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            raise PolicyPatchError(f"cannot write {place} ({what}): {remedy}") from error
        raise


def refuse_closed(folder: Path, key: str) -> None:
    """Refuse a folder that is there and cannot be written, or that could not be made.

    Args:
        folder: where something is to be written.
        key: the config key that says so.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise PolicyPatchError(f"{key} is {folder}, but {nearest} is a file: choose another folder")
    if not os.access(nearest, os.W_OK):
        raise PolicyPatchError(f"{key} is {folder}, and {nearest} cannot be written: choose another folder")


def say_if_full(folder: Path, error: Exception) -> None:
    """Raise OSError where a writer failed because the disk is full, which libraries tell in words of their own."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE))
    except OSError as found:
        if found.errno in FULL:
            raise found from error
    finally:
        probe.unlink(missing_ok=True)
