"""Which of several patches, in which order and how strong: searched by Optuna against the evaluation.

The paper (arXiv 2511.08484) finds that order matters and leaves open whether composition can be automated. Candidates
are compared on one half of the prompts; what is chosen is reported on the other, as the best of many looks better than
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from statistics import median
from typing import Any

import optuna
import torch
from torch import Tensor

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.measure import Measured
from policypatch.evaluate.probes import Bench, Probe, half
from policypatch.model.arm import Arm
from policypatch.patch.artifact import Patch

SCALES = (0.5, 1.5)  # what a patch's vectors may be multiplied by
MOST_ORDERS = 15  # candidates that a search begins with: all orders of all subsets of three patches


@dataclass(frozen=True)
class Candidate:
    """Patches by number, in the order in which they stand, and what each is multiplied by."""

    order: tuple[int, ...]
    scales: tuple[float, ...]

    def vectors(self, patches: Sequence[Patch]) -> Tensor:
        """(sum of L_i, D)."""
        parts = [scale * patches[i].vectors for i, scale in zip(self.order, self.scales, strict=True)]
        return torch.cat(parts)

    def named(self, patches: Sequence[Patch]) -> str:
        """For a table: tox + 0.8 bias; patches of one name by their numbers as well."""
        names = [patch.manifest.name for patch in patches]
        told = [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names, 1)]
        strengths = ["" if scale == 1 else f"{scale:.2g} " for scale in self.scales]
        return " + ".join(f"{s}{told[i]}" for i, s in zip(self.order, strengths, strict=True))


@dataclass(frozen=True)
class Aim:
    """A figure that is to be small: of a risk (or utility), by the judge that had the least part in its training."""

    risk: str
    metric: str

    @classmethod
    def read(cls, text: str) -> Aim:
        """From `risk.metric`."""
        risk, _, metric = text.partition(".")
        if not metric:
            raise PolicyPatchError(f"--objective is {text!r}: give RISK.METRIC, such as toxicity.toxic_rate")
        return cls(risk, metric)

    def __str__(self) -> str:
        """As it is read."""
        return f"{self.risk}.{self.metric}"


@dataclass(frozen=True)
class Tried:
    """A candidate and its figures, one for each aim."""

    candidate: Candidate
    values: tuple[float, ...]


def hand_made(count: int) -> list[Candidate]:
    """What one would try by hand: all orders of all subsets, where these are not too many.

    Of more patches: all of them as given and the other way round, each alone, each two as given.
    """
    numbers = range(count)
    found = [order for size in range(count, 0, -1) for order in permutations(numbers, size)]
    if len(found) > MOST_ORDERS:
        found = [tuple(numbers), tuple(reversed(numbers)), *((i,) for i in numbers), *combinations(numbers, 2)]
    return [Candidate(order, (1.0,) * len(order)) for order in found]


def search(
    count: int,
    measure: Callable[[Candidate], tuple[float, ...]],
    aims: int,
    budget: int,
    seed: int,
    scaled: bool = True,
) -> list[Tried]:
    """Measure up to `budget` candidates: those made by hand first, then what Optuna's TPE makes of all figures so far.

    Args:
        count: patches.
        measure: gives a candidate's figures, smaller is better.
        aims: how many these are.
        budget: candidates in all.
        seed: of the sampler.
        scaled: whether strengths are searched as well.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, multivariate=True)
    study = optuna.create_study(directions=["minimize"] * aims, sampler=sampler)
    for candidate in hand_made(count)[:budget]:
        study.enqueue_trial(_as_parameters(candidate, count, scaled))
    tried: dict[Candidate, Tried] = {}

    def objective(trial: optuna.Trial) -> tuple[float, ...]:
        candidate = _suggested(trial, count, scaled)
        if candidate not in tried:
            tried[candidate] = Tried(candidate, measure(candidate))
        return tried[candidate].values

    for _ in range(3 * budget):  # a candidate that comes up again costs nothing, and is none of the budget
        if len(tried) >= budget:
            break
        study.optimize(objective, n_trials=1)
    return list(tried.values())


def _suggested(trial: optuna.Trial, count: int, scaled: bool) -> Candidate:
    """Subset, order and strengths from numbers that a sampler can model each by itself."""
    places, scales, there = [], [], []
    for i in range(count):
        there.append(trial.suggest_categorical(f"there{i}", [True, False]))
        places.append(trial.suggest_float(f"place{i}", 0.0, 1.0))
        scales.append(trial.suggest_float(f"scale{i}", *SCALES, step=0.1) if scaled else 1.0)
    present = [i for i in range(count) if there[i]] or [min(range(count), key=lambda i: places[i])]
    order = sorted(present, key=lambda i: places[i])
    return Candidate(tuple(order), tuple(round(scales[i], 6) for i in order))


def _as_parameters(candidate: Candidate, count: int, scaled: bool) -> dict[str, Any]:
    """What `_suggested` makes that candidate of."""
    found: dict[str, Any] = {}
    for i in range(count):
        place = candidate.order.index(i) if i in candidate.order else count - 1
        found |= {f"there{i}": i in candidate.order, f"place{i}": place / max(1, count - 1)}
        if scaled:
            found[f"scale{i}"] = 1.0
    return found


def pareto(tried: Sequence[Tried]) -> list[Tried]:
    """Those that no other is at least as good as in every aim and better in one."""

    def beaten(one: Tried) -> bool:
        return any(
            all(a <= b for a, b in zip(other.values, one.values, strict=True)) and other.values != one.values
            for other in tried
        )

    return [one for one in tried if not beaten(one)]


def best(tried: Sequence[Tried], base: Sequence[float]) -> Tried:
    """The one whose figures are the smallest shares of the base's on average; where the base has 0, of the median's.

    Not of the largest: one stack that ruins everything would make all others alike.
    """
    sizes = [b or median(abs(one.values[i]) for one in tried) or 1.0 for i, b in enumerate(base)]
    return min(tried, key=lambda one: sum(value / size for value, size in zip(one.values, sizes, strict=True)))


@dataclass(frozen=True)
class Asked:
    """An aim and what answers it: the probe, on either half, and the judge."""

    aim: Aim
    probes: tuple[Probe, Probe]
    judge: str | None

    def measured(self, bench: Bench, vectors: Tensor | None, name: str, which: int) -> Measured:
        """The figure behind these vectors, None for the base, on one half."""
        outcome = self.probes[which].measure(bench, Arm(name, vectors=vectors))
        return next(m for m in outcome.measured if (m.name, m.judge) == (self.aim.metric, self.judge))


def usual(risks: Sequence[str], probes: Sequence[Probe]) -> list[Aim]:
    """The figure that speaks for each of these risks, and what a patch costs in utility."""
    first = {probe.risk: probe.metrics[0] for probe in reversed(probes)}
    return [Aim(risk, first[risk]) for risk in risks if risk in first] + [Aim("utility", "kl_benign")]


def asked(aim: Aim, probes: Sequence[Probe], filters: Sequence[str], marked: Sequence[str] = ()) -> Asked:
    """The first of the probes that has an aim's figure.

    Args:
        aim: what is wanted.
        probes: of all risks.
        filters: judges that choose training pairs: another speaks where there is one.
        marked: judges that had any part in training, as one that counts the filter's words: preferred to the filter's
            own, where there is none that had no part.

    Raises:
        PolicyPatchError: none has; with those there are.
    """
    known: list[str] = []
    for probe in probes:
        known += [f"{probe.risk}.{metric}" for metric in probe.metrics]
        if probe.risk == aim.risk and aim.metric in probe.metrics:
            judges = getattr(probe, "judges", {})  # those that only read probabilities have none
            judge = min(judges, key=lambda name: (name in filters, name in marked), default=None)
            return Asked(aim, (half(probe, 0), half(probe, 1)), judge)
    raise PolicyPatchError(
        f"--objective {aim} is measured by nothing here: choose from {', '.join(dict.fromkeys(known))}"
    )
