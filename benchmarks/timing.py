"""Timing two ways of the same work in turn: the machine's noise hits both alike, so ratios of neighbours count."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

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


def bracketed(
    ours: Callable[[int], object], others: Mapping[str, Callable[[int], object]], repeats: int
) -> tuple[list[list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """Ours before and after every other one, whose time is held against the mean of the two.

    Everything is called with the number of the turn, 0 being one that allocates and does not count.

    Returns:
        seconds of ours, a list for each turn; seconds of the others; how many times ours each of these took.
    """
    own: list[list[float]] = []
    seconds: dict[str, list[float]] = {name: [] for name in others}
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for turn in range(repeats + 1):
        gc.collect()
        runs = [timed(partial(ours, turn))]
        taken = {}
        for name, other in others.items():
            taken[name] = timed(partial(other, turn))
            runs.append(timed(partial(ours, turn)))
        if turn:
            own.append(runs)
            for (name, of), before, after in zip(taken.items(), runs[:-1], runs[1:], strict=True):
                seconds[name].append(of)
                ratios[name].append(2 * of / (before + after))
    return own, seconds, ratios
