"""Timing two ways of the same work in turn: the machine's noise hits both alike, so the ratio of neighbours counts."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, until the GPU has done it where there is one, without collections of garbage."""
    gc.disable()  # of what other sides have left behind, which may take as long as a step on a GPU
    try:
        finish()
        start = time.perf_counter()
        function()
        finish()
        return time.perf_counter() - start
    finally:
        gc.enable()


def finish() -> None:
    """Wait for what a GPU was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, called one after the other, `repeats` times after a first one that allocates."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        gc.collect()
        for name, function in functions.items():
            seconds[name].append(timed(function))
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """Of neighbouring runs."""
    return spread([a / b for a, b in zip(of, to, strict=True)])
