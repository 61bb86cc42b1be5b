"""The other methods against the patch on the same prompts: tests against the base cannot tell two of them apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policypatch.evaluate.per_prompt import nanmean
from policypatch.evaluate.scorecard import PER_PROMPT
from policypatch.evaluate.statistics import Difference, paired_difference
from policypatch.files.atomic import read_json
from policypatch.report.compare_lines import Column, Comparison, Line
from policypatch.report.metrics import METRICS
from policypatch.report.records import Record

METHOD = "method.name"


@dataclass(frozen=True)
class HeadToHead:
    """What the patch is compared with, and in what.

    Attributes:
        columns: figures of which less is better.
        lines: the other settings.
        differences: by a line's number and a column the other less the patch; none where they share no seed or prompt.
    """

    columns: Sequence[Column]
    lines: Sequence[Line]
    differences: Mapping[tuple[int, Column], Difference]


def head_to_head(found: Comparison) -> HeadToHead | None:
    """Every other setting against the patch, prompt by prompt; a prompt's value is the mean over the seeds of both.

    None where the method is not what the runs differ in, or there is not exactly one setting with a patch.
    """
    patches = [line for line in found.settings if line.values.get(METHOD) == "patch"]
    rivals = [line for line in found.settings if line.values.get(METHOD) not in ("patch", "none", None)]
    if METHOD not in found.keys or len(patches) != 1 or not rivals:
        return None
    columns = [c for c in found.columns if c in patches[0].cells and lower_is_better(c)]
    values = {id(record): _values(record) for line in [*patches, *rivals] for record in line.records}
    differences = {}
    for number, line in enumerate(rivals):
        for column in columns:
            theirs, ours = (nanmean(np.array(rows).T) for rows in _paired(line, patches[0], column, values))
            if not np.isnan(theirs - ours).all():
                differences[number, column] = paired_difference(theirs, ours)
    columns = [column for column in columns if any((number, column) in differences for number in range(len(rivals)))]
    return HeadToHead(columns, rivals, differences) if differences else None


def lower_is_better(column: Column) -> bool:
    """Whether one arm is better than another where it has less: also of KL, which against the base says nothing."""
    return column.metric == "kl_benign" or (column.metric in METRICS and METRICS[column.metric].better == "lower")


def difference_text(metric: str, difference: Difference) -> str:
    """Signed, with its interval; of perplexities, whose logarithms are tested (`tested_values`), the ratio."""
    numbers = (difference.mean, difference.low, difference.high)
    # Rounded first, as a mean of differences that cancel out is 1e-17.
    mean, low, high = (f"×{math.exp(x):.2f}" if "ppl" in metric else f"{round(x, 9):+.2g}" for x in numbers)
    return f"{mean} [{low}, {high}]"


def _values(record: Record) -> dict[tuple[str, Column], np.ndarray]:
    """By arm and column; nothing of a run from before they were written down."""
    path = record.folder / PER_PROMPT
    rows: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    return {(row["arm"], Column.of(row)): np.array(row["values"], dtype=float) for row in rows}


def _paired(
    theirs: Line, ours: Line, column: Column, values: Mapping[int, Mapping[tuple[str, Column], np.ndarray]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Values under each seed that both have, on the same prompts: those on which the base comes to the same."""
    by_seed = {record.settings.get("seed"): values[id(record)] for record in ours.records}
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for record in theirs.records:
        mine, other = by_seed.get(record.settings.get("seed")), values[id(record)]
        if mine is None or (theirs.arm, column) not in other or (ours.arm, column) not in mine:
            continue
        first, second = mine.get(("base", column)), other.get(("base", column))
        if first is None or second is None or first.shape != second.shape:
            continue
        if np.allclose(first, second, atol=1e-6, equal_nan=True):
            found[0].append(other[theirs.arm, column])
            found[1].append(mine[ours.arm, column])
    return found
