"""From filled metrics to scorecard rows: each figure, its interval, its bound, its paired difference to the base."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from policypatch import ranks
from policypatch.evaluate.metrics import PerPromptMetric
from policypatch.evaluate.scorecard import Row
from policypatch.evaluate.statistics import paired_difference

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One metric of one arm: the filled metric, who judged, and how many texts that judge failed on."""

    name: str
    judge: str | None
    metric: PerPromptMetric
    unjudged: int = 0


@dataclass(frozen=True)
class Settings:
    """How certain, and how the certainty is computed.

    Attributes:
        level: of the intervals, e.g. 0.95.
        resamples: bootstrap draws over prompts.
        seed: of bootstrap and permutation tests.
    """

    level: float = 0.95
    resamples: int = 2000
    seed: int = 0


def filled(name: str, judge: str | None, metric: PerPromptMetric, values: torch.Tensor, unjudged: int = 0) -> Measured:
    """A metric with its values: (N, k), or (N,) for k = 1. Each rank puts in its share; all have the whole."""
    share = ranks.share(len(values))
    metric.update(values[share.start : share.stop])
    metric.gather()
    return Measured(name, judge, metric, unjudged)


def rows_of(
    arms: Mapping[str, Sequence[Measured]], risk: str, split: str, marked: Collection[str], settings: Settings
) -> list[Row]:
    """Scorecard rows of all arms; the first arm is the one the others are compared with, prompt by prompt.

    A metric without a figure (the perplexity of an arm whose completions are all empty) gets no row but a warning.

    Args:
        arms: arm -> its metrics over the same prompts; an arm may lack some that the first one has.
        risk: named in every row.
        split: named in every row.
        marked: judges, and metrics without one, that had a part in training.
        settings: level, resamples, seed.
    """
    reference = {(of.name, of.judge): of for of in next(iter(arms.values()))}
    rows = []
    for arm, measured in arms.items():
        for ours in measured:
            base = reference[ours.name, ours.judge]
            value = float(ours.metric.compute())
            if math.isnan(value):
                log.warning("%s has no %s: no completion has a value; it is left out of the scorecard", arm, ours.name)
                continue
            low, high = ours.metric.interval(settings.level, settings.resamples, settings.seed)
            row = Row(
                arm=arm,
                risk=risk,
                split=split,
                judge=ours.judge,
                metric=ours.name,
                value=value,
                low=low,
                high=high,
                n=ours.metric.count(),
                filter=(ours.judge or ours.name) in marked,
                upper=ours.metric.upper(settings.level),
                unjudged=ours.unjudged,
                **({} if ours is base else _against(ours, base, settings)),
            )
            rows.append(row)
    return rows


def values_of(arms: Mapping[str, Sequence[Measured]], risk: str, split: str) -> list[dict[str, Any]]:
    """What paired tests compare, prompt by prompt, so that arms of other runs can be compared later.

    Returns:
        for each metric of each arm `arm`, `risk`, `split`, `judge`, `metric` and `values`: one for each prompt in the
        order of the set, None where it has none; of a perplexity its logarithm (see `tested_values`).
    """
    return [
        {
            "arm": arm,
            "risk": risk,
            "split": split,
            "judge": of.judge,
            "metric": of.name,
            "values": [None if math.isnan(v) else round(v, 8) for v in of.metric.tested_values().tolist()],
        }
        for arm, measured in arms.items()
        for of in measured
    ]


def _against(ours: Measured, base: Measured, settings: Settings) -> dict[str, float]:
    """Arm minus base: the figures' difference with its paired interval, and a paired test over prompts.

    Empty where no prompt has a value in both, so that nothing can be paired.
    """
    tested, reference = ours.metric.tested_values().numpy(), base.metric.tested_values().numpy()
    if np.isnan(tested - reference).all():
        return {}
    delta, low, high = ours.metric.difference(base.metric, settings.level, settings.resamples, settings.seed)
    test = paired_difference(tested, reference, settings.seed)
    return {"delta": delta, "delta_low": low, "delta_high": high, "p_value": test.p_value}
