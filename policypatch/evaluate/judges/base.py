"""What every judge promises, and what every judge gets for free: de-duplication, batching, validation.

A judge maps a text, or a text and the request it answers, to a score in [0, 1]: of the risk toxicity how toxic the
text is, of the risk harmfulness whether the response complies with the request (1) or refuses it (0). The evaluation
hands it hundreds of thousands of texts, many of them equal (empty ones above all), and its numbers end up in a
scorecard, so a NaN must stop the run where it appears and not three tables later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from policypatch.errors import PolicyPatchError


@runtime_checkable
class Judge(Protocol):
    """Scores texts; what metrics, pairs and reports depend on."""

    name: str
    """How it calls itself in errors and logs, e.g. ``svm``; scorecards use its key under ``risk.judges``."""
    fingerprint: str
    """Content identity for cache keys: kind, versions or digests, and settings that change a score."""

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
        """Return scores, shape (N,), float64 in [0, 1], higher = worse; an empty text is 0.0.

        `prompts`, shape (N,), are the requests that the texts answer; a judge that does not read them ignores them.
        """
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
    reads_prompt: ClassVar[bool] = False
    """Whether a text's score depends on the request that it answers."""

    def __init__(self, name: str, batch_size: int) -> None:
        if batch_size < 1:
            raise PolicyPatchError(f"judge {name}: batch_size must be at least 1, not {batch_size}")
        self.name = name
        self.batch_size = batch_size

    # Any, as mypy lets an override narrow only this to (texts) in one judge and (texts, prompts) in another.
    @abstractmethod
    def _score_batch(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Score at most `batch_size` distinct, non-blank texts: shape (n,), [0, 1].

        Called with `(texts: list[str])`, and with `(texts, prompts: list[str])` where `reads_prompt`.
        """

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
        """Score `texts`: shape (N,), float64 in [0, 1], higher = worse.

        A text that is empty or only white space scores 0.0 by definition: a model that says nothing said nothing
        toxic and did not comply, and classifiers disagree wildly about the empty string. Equal texts are scored
        once; where the judge reads prompts, texts that are equal and answer the same prompt.

        Args:
            texts: what is scored.
            prompts: the request that each text answers; ignored by a judge that does not read it.

        Raises:
            PolicyPatchError: the argument is one string, a row is not a string, prompts are needed and are not
                there or are not as many, or the judge answered with NaN, something outside [0, 1] or the wrong
                number of scores; the message names the judge and the text, counted from 1.
        """
        rows_of: dict[tuple[str, str], list[int]] = {}
        for row, (text, prompt) in enumerate(zip(texts, self._prompts(texts, prompts), strict=True)):
            for value in (text, prompt):
                if not isinstance(value, str):
                    raise PolicyPatchError(f"judge {self.name}: text {row + 1} is {type(value).__name__}, not a text")
            if text.strip():
                rows_of.setdefault((text, prompt), []).append(row)
        scores = np.zeros(len(texts), dtype=np.float64)
        # Neighbours of like length pad least, and the order does not change what a text scores.
        unique = sorted(rows_of, key=lambda pair: len(pair[0]) + len(pair[1]))
        for start in range(0, len(unique), self.batch_size):
            batch = unique[start : start + self.batch_size]
            rows = [rows_of[pair] for pair in batch]
            for row_list, value in zip(rows, self._checked(batch, rows), strict=True):
                scores[row_list] = value
        return scores

    def _prompts(self, texts: Sequence[str], prompts: Sequence[str] | None) -> Sequence[str]:
        """A prompt for each text; all the same where they make no difference."""
        if isinstance(texts, str) or isinstance(prompts, str):
            raise PolicyPatchError(f"judge {self.name}: score takes a list of texts, not one string")
        if not self.reads_prompt:
            return [""] * len(texts)
        if prompts is None:
            raise PolicyPatchError(
                f"judge {self.name} reads the request that a text answers: call score(texts, prompts), and use it "
                "with risks whose prompts are requests"
            )
        if len(prompts) != len(texts):
            raise PolicyPatchError(f"judge {self.name}: {len(texts)} texts but {len(prompts)} prompts")
        return prompts

    def _checked(self, batch: list[tuple[str, str]], rows: list[list[int]]) -> np.ndarray:
        texts = [text for text, _ in batch]
        given = (texts, [prompt for _, prompt in batch]) if self.reads_prompt else (texts,)
        values = np.asarray(self._score_batch(*given), dtype=np.float64)
        if values.shape != (len(batch),):
            raise PolicyPatchError(
                f"judge {self.name}: returned scores of shape {values.shape} for {len(batch)} texts "
                f"(the batch that starts with text {rows[0][0] + 1})"
            )
        # float32 sigmoids may stand a rounding error outside the interval; anything more is a fault.
        wrong = ~((values >= -1e-6) & (values <= 1 + 1e-6))  # written so that NaN is wrong too
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise PolicyPatchError(
                f"judge {self.name}: text {rows[first][0] + 1} scored {values[first]}, which is not in [0, 1]"
            )
        return np.clip(values, 0.0, 1.0)
