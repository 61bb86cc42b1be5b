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
        place: the folder that is written to; an error about a file elsewhere passes.
        remedy: what to do, a clause.

    Raises:
        PolicyPatchError: instead of such an OSError.
    """
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename  # of a copy the second is what was written
        if name is not None and not Path(os.fsdecode(name)).is_relative_to(place):
            raise
        if error.errno in FULL:
            raise PolicyPatchError(f"no room left on the disk of {place}: {remedy}") from error
        if error.errno in CLOSED:
            what = f"{name}: {error.strerror}" if name else error.strerror
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


@contextmanager
def written(target: Path) -> Iterator[None]:
    """Within the block, a writer of `target` that fails because the disk is full raises OSError, with its name.

    Libraries tell it in words of their own, and the system does not say which file it was.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(target)
        raise
    except PolicyPatchError:
        raise
    except Exception as error:
        if os.strerror(errno.ENOSPC) in str(error) or _is_full(target.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise


def _is_full(folder: Path) -> bool:
    """Whether there is no room for a small file."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE))
    except OSError as error:
        return error.errno in FULL
    finally:
        probe.unlink(missing_ok=True)
    return False
