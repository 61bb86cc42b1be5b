"""What share of a reduction is kept: of a stack's by one shorter patch, of a patch's by the same on another base."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from policypatch.evaluate.drift import Place, place_of
from policypatch.evaluate.measure import Settings
from policypatch.evaluate.per_prompt import nanmean
from policypatch.evaluate.statistics import bootstrap_interval

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Kept:
    """A share of a figure's reduction.

    Attributes:
        place: risk, split, metric, judge.
        reduction: the whole one, of the base's figure less that behind what did all of it.
        share: of that, what is kept; above 1 where it is more.
        low: of its interval over prompts; None where the whole reduction is not told from none, so that a share of it
            may be anything.
        high: likewise.
    """

    place: Place
    reduction: float
    share: float
    low: float | None
    high: float | None

    def told(self) -> str:
        """The share in words: 84% [71%, 95%]."""
        if self.low is None or self.high is None:
            return f"{self.share:.0%} [no interval: the reduction is not told from none]"
        return f"{self.share:.0%} [{self.low:.0%}, {self.high:.0%}]"

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        names = dict(zip(("risk", "split", "metric", "judge"), self.place, strict=True))
        return names | {"reduction": self.reduction, "share": self.share, "low": self.low, "high": self.high}


def kept(
    now: Iterable[Mapping[str, Any]],
    ours: str,
    then: Iterable[Mapping[str, Any]],
    whole: str,
    metrics: Collection[str],
    settings: Settings,
) -> list[Kept]:
    """The share of every figure of these metrics; none where there is no reduction to keep.

    Args:
        now: lines of values prompt by prompt (`values_of`), with those of `base` and of `ours`.
        ours: the arm that keeps a share.
        then: lines on the same prompts, with those of `base` and of `whole`; may be the same.
        whole: the arm whose reduction is the whole.
        metrics: names of those that are means over prompts and of which less is better.
        settings: of the intervals; a bootstrap draw takes a prompt with all four of its values.
    """
    by_arm = [_by_arm(lines) for lines in (then, now)]
    found = []
    for place in by_arm[1].get(ours, {}):
        if place[2] not in metrics:
            continue
        four = [of.get(arm, {}).get(place) for of, arm in zip(by_arm * 2, ("base", "base", whole, ours), strict=True)]
        arrays = [values for values in four if values is not None]
        if len(arrays) == 4 and len({len(values) for values in arrays}) == 1:
            share = _share(place, np.stack(arrays, axis=1), settings)
            found += [share] if share is not None else []
    return found


def _by_arm(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[Place, Values]]:
    found: dict[str, dict[Place, Values]] = {}
    for line in lines:
        found.setdefault(line["arm"], {})[place_of(line)] = np.array(line["values"], dtype=float)
    return found


def _share(place: Place, rows: Values, settings: Settings) -> Kept | None:
    """Of (N, 4): values of base and base, whole and ours."""
    rows = rows[~np.isnan(rows).any(axis=1)]

    def reductions(drawn: Values) -> tuple[Values, Values]:
        means = nanmean(np.moveaxis(drawn, 1, -1))  # (R, 4)
        return means[:, 0] - means[:, 2], means[:, 1] - means[:, 3]

    if not len(rows):
        return None
    whole, ours = (float(x[0]) for x in reductions(rows[None]))
    if whole <= 1e-9:
        return None
    how = {"level": settings.level, "resamples": settings.resamples, "seed": settings.seed}
    least, _ = bootstrap_interval(rows, lambda drawn: reductions(drawn)[0], **how)  # type: ignore[arg-type]
    low, high = None, None
    if least > 0:

        def ratio(drawn: Values) -> Values:
            all_of_it, some = reductions(drawn)
            return np.where(all_of_it > 0, some / np.where(all_of_it > 0, all_of_it, 1), np.nan)

        low, high = bootstrap_interval(rows, ratio, **how)  # type: ignore[arg-type]
    return Kept(place, whole, ours / whole, low, high)
