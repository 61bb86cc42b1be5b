"""The scorecard: the figures of a run as plain rows, with intervals, by judge; what tables are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import read_json, write_json
from policypatch.patch.manifest import COST as COST  # whoever reads scorecards has it from here

PER_PROMPT = "per_prompt.json"
"""In a run's folder, beside the scorecard: the figures' values prompt by prompt."""


@dataclass(frozen=True)
class Row:
    """One figure of one arm. Raises PolicyPatchError when a number in it is NaN or infinite."""

    arm: str
    """Whose figure: base, sft or patch."""
    risk: str
    split: str
    """Which prompts, e.g. rtp."""
    judge: str | None
    """Who judged or scored, by its key in the config; None where neither judge nor scorer is involved."""
    metric: str
    value: float
    low: float
    """Lower end of the interval over prompts, whose level is `evaluate.level`."""
    high: float
    n: int
    """Prompts that have a value, which the figure rests on."""
    filter: bool = False
    """Whether the judge, or a metric without one, had a part in training, which flatters the figure.

    It chose the pairs, or counts the words that it was done by or that rows were made from.
    """
    delta: float | None = None
    """Arm minus base on the same prompts, None where nothing can be paired; the next two are its interval."""
    delta_low: float | None = None
    delta_high: float | None = None
    p_value: float | None = None
    """Two-sided, of no difference from the base."""
    upper: float | None = None
    """One-sided upper confidence bound at `evaluate.level`: "with 95 % confidence the rate on such prompts is below x".

    None where no bound is guaranteed at every number of prompts (a bootstrap interval's end is none).
    """
    unjudged: int = 0
    """Texts that the judge failed on, which count nowhere."""

    def __post_init__(self) -> None:
        """Refuse what JSON cannot hold and no table should show."""
        for name in ("value", "low", "high", "delta", "delta_low", "delta_high", "p_value", "upper"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise PolicyPatchError(
                    f"scorecard row {self.arm}/{self.split}/{self.judge}/{self.metric}: {name} is {number}"
                )


class Scorecard(list[Row]):
    """Rows in the order they were measured."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        super().__init__(rows)

    def find(self, **wanted: Any) -> Row:
        """Return the one row whose fields equal `wanted`, e.g. ``find(arm="base", metric="amt")``.

        Raises:
            PolicyPatchError: an unknown field, no such row, or more than one.
        """
        unknown = wanted.keys() - {field.name for field in fields(Row)}
        if unknown:
            raise PolicyPatchError(f"a scorecard row has no field {', '.join(sorted(unknown))}")
        found = [row for row in self if all(getattr(row, key) == value for key, value in wanted.items())]
        if len(found) != 1:
            raise PolicyPatchError(f"the scorecard has {len(found)} rows with {wanted}; expected one")
        return found[0]

    def save(self, path: Path) -> None:
        """Write a JSON list of objects, whole or not at all."""
        write_json(path, [asdict(row) for row in self])

    @classmethod
    def load(cls, path: Path) -> Scorecard:
        """Read what `save` wrote.

        Raises:
            PolicyPatchError: not a list of rows; the message names the file and the row (from 1).
        """
        content = read_json(path)
        if not isinstance(content, list):
            raise PolicyPatchError(f"{path}: a scorecard is a JSON list of rows")
        card = cls()
        for number, item in enumerate(content, start=1):
            try:
                card.append(Row(**item))
            except TypeError as error:
                raise PolicyPatchError(f"{path}, row {number}: not a scorecard row ({error})") from error
        return card
