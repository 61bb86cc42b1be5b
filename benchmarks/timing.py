"""Timing two ways of the same work in turn: the machine's noise hits both alike, so the ratio of neighbours counts."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from policypatch.model.latency import undisturbed

Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, until the GPU has done it where there is one, without collections of garbage."""
    with undisturbed():
        finish()
        start = time.perf_counter()
        function()
        finish()
        return time.perf_counter() - start


def finish() -> None:
    """Wait for what a GPU was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, called one after the other, `repeats` times after a first one that allocates.

    Every other time in the opposite order, so that none always comes after the same one, or after the collection.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        gc.collect()
        for name in [*functions][:: -1 if turn % 2 else 1]:
            seconds[name].append(timed(functions[name]))
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """Of neighbouring runs."""
    return spread([a / b for a, b in zip(of, to, strict=True)])
