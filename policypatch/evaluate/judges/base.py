"""What every judge promises, and what every judge gets for free: de-duplication, batching, validation.

A judge maps a text to a toxicity in [0, 1]. The evaluation hands it hundreds of thousands of
continuations, many of them equal (empty ones above all), and its numbers end up in a scorecard, so a NaN
must stop the run where it appears and not three tables later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from policypatch.errors import PolicyPatchError


@runtime_checkable
class Judge(Protocol):
    """Scores texts; what metrics, pairs and reports depend on."""

    name: str
    """How it calls itself in errors and logs, e.g. ``svm``; scorecards use its key under ``risk.judges``."""
    fingerprint: str
    """Content identity for cache keys: kind, versions or digests, and settings that change a score."""

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Return toxicities, shape (N,), float64 in [0, 1], higher = more toxic; an empty text is 0.0."""
        ...


class BaseJudge(ABC):
    """Shared half of the judges in this folder; a subclass writes `_score_batch` only.

    Args:
        name: how the judge calls itself in errors and logs.
        batch_size: most texts handed to `_score_batch` at once; must be positive.

    Raises:
        PolicyPatchError: `batch_size` is not positive.
    """

    fingerprint: str

    def __init__(self, name: str, batch_size: int) -> None:
        if batch_size < 1:
            raise PolicyPatchError(f"judge {name}: batch_size must be at least 1, not {batch_size}")
        self.name = name
        self.batch_size = batch_size

    @abstractmethod
    def _score_batch(self, texts: list[str]) -> np.ndarray:
        """Score at most `batch_size` distinct, non-blank texts: shape (n,), [0, 1]."""

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Score `texts`: shape (N,), float64 in [0, 1], higher = more toxic.

        A text that is empty or only white space scores 0.0 by definition: a model that says nothing
        said nothing toxic, and classifiers disagree wildly about the empty string. Equal texts are
        scored once.

        Raises:
            PolicyPatchError: the argument is one string, a row is not a string, or the judge answered
                with NaN, something outside [0, 1] or the wrong number of scores; the message names the
                judge and the row.
        """
        if isinstance(texts, str):
            raise PolicyPatchError(f"judge {self.name}: score takes a list of texts, not one string")
        rows_of: dict[str, list[int]] = {}
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise PolicyPatchError(f"judge {self.name}: row {row} is {type(text).__name__}, not a text")
            if text.strip():
                rows_of.setdefault(text, []).append(row)
        scores = np.zeros(len(texts), dtype=np.float64)
        # Neighbours of like length pad least, and the order does not change what a text scores.
        unique = sorted(rows_of, key=len)
        for start in range(0, len(unique), self.batch_size):
            batch = unique[start : start + self.batch_size]
            rows = [rows_of[text] for text in batch]
            for row_list, value in zip(rows, self._checked(batch, rows), strict=True):
                scores[row_list] = value
        return scores

    def _checked(self, batch: list[str], rows: list[list[int]]) -> np.ndarray:
        values = np.asarray(self._score_batch(batch), dtype=np.float64)
        if values.shape != (len(batch),):
            raise PolicyPatchError(
                f"judge {self.name}: returned scores of shape {values.shape} for {len(batch)} texts "
                f"(the batch that starts with row {rows[0][0]})"
            )
        # float32 sigmoids may stand a rounding error outside the interval; anything more is a fault.
        wrong = ~((values >= -1e-6) & (values <= 1 + 1e-6))  # written so that NaN is wrong too
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise PolicyPatchError(
                f"judge {self.name}: row {rows[first][0]} scored {values[first]}, which is not in [0, 1]"
            )
        return np.clip(values, 0.0, 1.0)
