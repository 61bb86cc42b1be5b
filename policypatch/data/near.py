"""Which texts say nearly what another text says, so that an evaluation set does not reappear in training reworded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np
from scipy import sparse

from policypatch.errors import Number

STEM = 5  # letters of a word that count: instruct, instructs and instructions are one
EVERYDAY = ("benign_train", "benign_eval", "scary_train", "scary_eval")  # files of everyday requests
SLICE = 1024  # texts compared at once, which bounds memory


def near_duplicates(texts: Sequence[str], others: Sequence[str], threshold: float = 0.6) -> set[int]:
    """Numbers of the texts that are near-duplicates of one of `others`.

    Two texts are as similar as the cosine between their sets of word stems, each weighted by log(1 + n / d), d being
    how many of n everyday requests have it (Salton & Buckley 1988): requests that share only their frame ("give
    instructions for ...") differ, one asked in another frame does not. Counted among the texts themselves, what both
    sides are about would weigh little, as many of them name it, and a rare frame much. Letters' case, punctuation,
    order of words do not count.

    Args:
        texts: what is looked through.
        others: what they are held against; none finds none.
        threshold: similarity, in (0, 1], from which on two are near-duplicates; 1 means the same stems.

    Raises:
        PolicyPatchError: another threshold.
    """
    Number(above=0, most=1).check("threshold", threshold)
    if not texts or not others:
        return set()
    everyday, compared = _everyday(), len(texts) + len(others)
    stems = _stems([*texts, *others, *everyday])
    spread = np.maximum(1, stems[compared:].sum(0))
    weighted = stems[:compared].multiply(np.log1p(len(everyday) / spread)[None]).tocsr()
    length = np.sqrt(weighted.multiply(weighted).sum(1))
    unit = sparse.diags_array(1 / np.where(length > 0, length, 1.0)) @ weighted
    ours, theirs = unit[: len(texts)], unit[len(texts) :].T.tocsr()
    best = [(ours[i : i + SLICE] @ theirs).max(axis=1).toarray().ravel() for i in range(0, len(texts), SLICE)]
    # Less a rounding error, so that a threshold of 1 finds equal texts.
    return {int(i) for i in np.flatnonzero(np.concatenate(best) >= threshold - 1e-9)}


@cache
def _everyday() -> list[str]:
    """The benign requests that ship."""
    files = [resources.files("policypatch") / "risks" / "prompts" / f"{name}.txt" for name in EVERYDAY]
    return [line for file in files for line in file.read_text("utf-8").splitlines() if line]


def normalise(text: str) -> str:
    """What two spellings of one text have in common: letters, digits and single spaces, in lower case."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _stems(texts: Sequence[str]) -> sparse.csr_array:
    """(N, S) 1 where a text has a stem."""
    numbers: dict[str, int] = {}
    found = [{numbers.setdefault(w[:STEM], len(numbers)) for w in normalise(text).split()} for text in texts]
    columns = [column for row in found for column in sorted(row)]
    starts = np.cumsum([0, *map(len, found)])
    return sparse.csr_array((np.ones(len(columns)), columns, starts), shape=(len(texts), max(1, len(numbers))))
