"""What is finished of something long, line by line, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """A file of JSON lines, each behind its digest: what a kill has torn, or a disk has damaged, ends what counts.

    Args:
        path: where it lies; its folder is made.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        self.rows = list(self._whole())
        """What was there."""

    def _whole(self) -> Iterator[Any]:
        end = 0
        for line in self._file:
            digest, _, text = line.partition(b" ")
            if not text.endswith(b"\n") or _digest(text[:-1]) != digest:
                break
            end += len(line)
            yield json.loads(text)
        self._file.truncate(end)

    def add(self, row: Any) -> None:
        """Write a row down."""
        text = json.dumps(row, separators=(",", ":")).encode("ascii")
        self._file.write(_digest(text) + b" " + text + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # as checkpoints are: a machine that goes down loses neither

    def close(self) -> None:
        """The file stays: its rows are of use until what they are part of is whole."""
        self._file.close()


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode("ascii")
