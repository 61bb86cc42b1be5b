"""Whether figures that were measured twice still are the same: today's scorecard against an earlier one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from policypatch.evaluate.probes.sampled import RATES

Place = tuple[str, str, str, str | None]


@dataclass(frozen=True)
class Change:
    """A figure then and now.

    Attributes:
        place: risk, split, metric, judge.
        then: as it was.
        now: as it is.
        p_value: two-sided, of no difference.
        differs: whether it is told from no difference among all that were compared.
    """

    place: Place
    then: float
    now: float
    p_value: float
    differs: bool


def changes(
    then: Mapping[str, Iterable[Mapping[str, Any]]],
    now: Mapping[str, Iterable[Mapping[str, Any]]],
    level: float = 0.95,
) -> dict[str, list[Change]]:
    """The figures that both scorecards have, by arm, in the order of `now`.

    Both are taken for independent samples, though they mostly share prompts: with common prompts the test is the more
    cautious. As many are compared, p-values of all arms together are held to Holm's (1979) thresholds, which keep the
    chance of any false alarm at 1 - level.

    Args:
        then: rows of the earlier scorecard, by arm.
        now: rows of today's.
        level: of the rows' intervals and of the test.
    """
    both: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
    for arm, rows in now.items():
        earlier = {place_of(row): row for row in then[arm]}
        both += [(arm, earlier[place_of(row)], row) for row in rows if place_of(row) in earlier]
    p_values = [p_of(old, new, level) for _, old, new in both]
    found: dict[str, list[Change]] = {arm: [] for arm in now}
    for (arm, old, new), p, differs in zip(both, p_values, holm(p_values, 1 - level), strict=True):
        found[arm].append(Change(place_of(new), old["value"], new["value"], p, differs))
    return found


def place_of(row: Mapping[str, Any]) -> Place:
    """What a figure is of."""
    return str(row["risk"]), str(row["split"]), str(row["metric"]), row.get("judge")


def p_of(then: Mapping[str, Any], now: Mapping[str, Any], level: float) -> float:
    """Of a share of prompts by Fisher's exact test; else of a normal difference, its spread told by the intervals."""
    if then["value"] == now["value"]:
        return 1.0
    if now["metric"] in RATES:
        counts = [(round(row["value"] * row["n"]), row["n"]) for row in (then, now)]
        return float(stats.fisher_exact([[hits, n - hits] for hits, n in counts])[1])
    width = 2 * stats.norm.ppf((1 + level) / 2)
    spread = np.hypot(*((row["high"] - row["low"]) / width for row in (then, now)))
    if spread == 0:
        return 0.0
    return float(2 * stats.norm.sf(abs(now["value"] - then["value"]) / spread))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses are rejected when the chance of any false rejection is held to alpha (Holm 1979)."""
    rejected = [False] * len(p_values)
    for step, number in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[number] > alpha / (len(p_values) - step):
            break
        rejected[number] = True
    return rejected
