"""Entries of the cache that are one array; of a long one each batch is written down once it is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policypatch import ranks
from policypatch.files.cache import begun, content_key, entry
from policypatch.progress import track


def array(kind: str, about: Mapping[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
    """An entry that is one array: from the cache, or made and kept under everything that `about` names."""

    def build(folder: Path) -> None:
        np.save(folder / "array.npy", make())

    return _read(entry(kind, content_key(**about), build, about=about))


def rows_array(
    kind: str,
    about: Mapping[str, Any],
    rows: int,
    make: Callable[[Sequence[range]], Iterator[np.ndarray]],
    what: str,
    at_once: int,
    final: Callable[[np.ndarray], bool] = lambda part: True,
) -> np.ndarray:
    """An entry that is an array of so many rows, made batch by batch: what is killed goes on behind its last batch.

    Args:
        kind, about: as of `array`.
        rows: its first dimension, which ranks share out.
        make: is given batches of consecutive row numbers, and yields the rows of each in turn.
        what: is made, beside the progress bar.
        at_once: rows of a batch.
        final: whether a batch need not be made again should the rest of them fail.
    """
    key = content_key(**about)

    def ours(share: range) -> np.ndarray:
        batches = [share[start : start + at_once] for start in range(0, len(share), at_once)] or [share]
        with begun(kind, key, share) as journal:
            made = {(start, stop): np.array(values, dtype) for start, stop, dtype, values in journal.rows}
            left = [batch for batch in batches if (batch.start, batch.stop) not in made]
            with track(what, len(share), len(share) - sum(map(len, left))) as advance:
                # Not even begun where nothing is left: to get ready may be costly.
                for batch, part in zip(left, make(left) if left else (), strict=True):
                    made[batch.start, batch.stop] = part
                    if batch and final(part):
                        journal.add([batch.start, batch.stop, str(part.dtype), part.tolist()])
                    if batch:
                        advance(len(batch))
        return np.concatenate([made[batch.start, batch.stop] for batch in batches])

    def build(folder: Path) -> None:
        np.save(folder / "array.npy", np.concatenate(ranks.parts(rows, ours)))

    return _read(entry(kind, key, build, about=about, together=True))


def _read(folder: Path) -> np.ndarray:
    found: np.ndarray = np.load(folder / "array.npy", allow_pickle=False)
    return found
