"""What all metrics over prompts have in common: each keeps one row of values for each prompt, so that it can give an
interval, a bound and a paired test and not only a number.

The state is a list that ranks concatenate, so two ranks give what one gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.statistics import bentkus_upper_bound, bootstrap_interval, clopper_pearson, upper_bound


class PerPromptMetric(Metric, ABC):
    """Base: collects rows; a subclass says how k samples become one value (`_per_prompt`).

    The figure is the mean of these over prompts; one that is something else overrides `_units` and
    `_statistic`, which serve `compute` and the bootstrap alike.

    Values are kept in float64 on the CPU or wherever the metric is moved. NaN means "no value", e.g. the
    perplexity of an empty continuation; it is skipped, and a prompt without any value counts nowhere.
    """

    is_differentiable = False
    full_state_update = False
    columns: int | None = None
    """How many values a row must have; None leaves that to the first update."""
    missing: float | None = None
    """What a sample without a value counts as in an upper bound; None leaves it out there as well."""
    rows: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Append one row for each prompt.

        Args:
            values: (B, k) sampled values of B prompts, NaN where there is none; (B,) counts as k = 1.

        Raises:
            PolicyPatchError: another shape, or another k than before.
        """
        values = values.detach()
        if values.ndim == 1:
            values = values[:, None]
        if values.ndim != 2 or values.shape[1] == 0:
            raise PolicyPatchError(
                f"{type(self).__name__}: values must be (prompts, samples), not {tuple(values.shape)}"
            )
        if self.columns not in (None, values.shape[1]):
            raise PolicyPatchError(
                f"{type(self).__name__}: every row needs {self.columns} values, not {values.shape[1]}"
            )
        if torch.isinf(values).any():
            raise PolicyPatchError(f"{type(self).__name__}: a value is infinite")
        held = self.rows if isinstance(self.rows, list) else [self.rows]
        if held and held[0].shape[1] != values.shape[1]:
            raise PolicyPatchError(
                f"{type(self).__name__}: every prompt needs the same number of samples; "
                f"had {held[0].shape[1]}, now {values.shape[1]}"
            )
        # MPS has no float64; everywhere else sums over 10^5 values should not depend on their order.
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        self.rows = [*held, values.to(dtype)]

    def gather(self) -> None:
        """Hold the rows of all ranks from now on, in the ranks' order; does nothing where there is one."""
        self.sync()
        self._to_sync = self._should_unsync = False  # `compute` need not do it for as long as it takes

    def compute(self) -> Tensor:
        """Return the figure, a scalar; NaN when no prompt has a value."""
        return torch.tensor(self._statistic(self._units().reshape(1, -1))[0], dtype=torch.float64)

    def per_prompt(self) -> Tensor:
        """Return each prompt's value: (N,) in the order of update, NaN where there is none."""
        return torch.from_numpy(self._per_prompt(self._array()))

    def tested_values(self) -> Tensor:
        """Return what the paired test compares: (N,), `per_prompt` unless the metric has a better scale for it."""
        return self.per_prompt()

    def interval(self, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Return low and high: percentile bootstrap over prompts, each drawn with all its k samples.

        Raises:
            PolicyPatchError: there is no prompt yet, or the arguments are out of range.
        """
        return bootstrap_interval(
            self._units(),
            lambda drawn: self._statistic(drawn.reshape(len(drawn), -1)),
            level=level,
            resamples=resamples,
            seed=seed,
        )

    def upper(self, level: float = 0.95) -> float | None:
        """Return a bound that the expected figure is below with confidence `level`, whatever the distribution.

        None where no such bound is known: for values without a limit, like a perplexity.

        Raises:
            PolicyPatchError: no prompt has a value, a value outside [0, 1], or the level is out of range.
        """
        return None

    def difference(
        self, other: PerPromptMetric, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float, float]:
        """Return this figure minus `other`'s, with the interval of that difference.

        Both must hold the same prompts in the same order: a bootstrap draw takes a prompt in both arms, so that
        what prompts have in common cancels. Unlike a mean of per-prompt differences this fits the median too.

        Raises:
            PolicyPatchError: another kind of metric, or other numbers of prompts or samples.
        """
        ours, theirs = self._units(), other._units()
        if type(self) is not type(other) or ours.shape != theirs.shape:
            raise PolicyPatchError(
                f"{type(self).__name__} over {ours.shape} cannot be paired with "
                f"{type(other).__name__} over {theirs.shape}"
            )
        width = ours.shape[1]

        def both(drawn: np.ndarray) -> np.ndarray:
            flat = [half.reshape(len(drawn), -1) for half in (drawn[:, :, :width], drawn[:, :, width:])]
            return self._statistic(flat[0]) - self._statistic(flat[1])

        joint = np.concatenate([ours, theirs], axis=1)
        low, high = bootstrap_interval(joint, both, level=level, resamples=resamples, seed=seed)
        return float(self.compute() - other.compute()), low, high

    def count(self) -> int:
        """Return how many prompts have a value."""
        return int((~np.isnan(self._per_prompt(self._array()))).sum())

    def _at_worst(self) -> np.ndarray:
        """Return the values that a bound rests on, (N,) or fewer: of all prompts with a value.

        A sample that a judge failed on might have been a case, so that a bound must count it as one.
        """
        rows = self._array()
        values = self._per_prompt(rows if self.missing is None else np.where(np.isnan(rows), self.missing, rows))
        return values[~np.isnan(values)]

    def _array(self) -> np.ndarray:
        """Return all rows, (N, k); (0, k) or (0, 0) before the first update."""
        if isinstance(self.rows, list) and not self.rows:
            return np.empty((0, self.columns or 0))
        return dim_zero_cat(self.rows).cpu().numpy().astype(np.float64, copy=False)

    @abstractmethod
    def _per_prompt(self, rows: np.ndarray) -> np.ndarray:
        """Reduce the samples: (..., k) -> (...)."""

    def _units(self) -> np.ndarray:
        """Return what the bootstrap draws rows of: (N, m).

        Drawing rows and then reducing their samples is drawing the reduced rows, k times cheaper.
        """
        return self._per_prompt(self._array())[:, None]

    def _statistic(self, values: np.ndarray) -> np.ndarray:
        """Reduce (R, N * m) to (R,), R being 1 or the number of resamples."""
        return nanmean(values)


class BoundedMean(PerPromptMetric):
    """Mean over prompts of values in [0, 1], whose expectation can be bounded."""

    def upper(self, level: float = 0.95) -> float | None:
        """Return Bentkus' bound, see `bentkus_upper_bound`."""
        return bentkus_upper_bound(self._at_worst(), level)


class BinaryRate(PerPromptMetric):
    """Share of prompts of which something is true; `_per_prompt` gives 0, 1 or NaN."""

    def interval(self, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
        """Return the exact Clopper-Pearson interval; `resamples` and `seed` are there for the signature.

        Raises:
            PolicyPatchError: no prompt has a value, or the level is out of range.
        """
        return clopper_pearson(self._hits(), self.count(), level)

    def upper(self, level: float = 0.95) -> float | None:
        """Return the exact one-sided Clopper-Pearson bound."""
        values = self._at_worst()
        return upper_bound(int(values.sum()), len(values), level)

    def _hits(self) -> int:
        return int(np.nansum(self._per_prompt(self._array())))


def nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN, and no warning, where nothing is left."""
    there = ~np.isnan(values)
    count = there.sum(axis=-1)
    total = np.where(there, values, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def nanmax(values: np.ndarray) -> np.ndarray:
    """Largest over the last axis without NaN; NaN where nothing is left."""
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    best = np.where(np.isnan(values), -np.inf, values).max(axis=-1)
    return np.where(np.isneginf(best), np.nan, best)


def nanmedian(values: np.ndarray) -> np.ndarray:
    """Median over the last axis without NaN; NaN where nothing is left."""
    # NaN sorts last, so the middle of the first `count` values is the median of those present; numpy's
    # nanmedian falls back to a Python loop over rows.
    count = (~np.isnan(values)).sum(axis=-1)
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    ordered = np.sort(values, axis=-1)
    last = np.maximum(count - 1, 0)
    low = np.take_along_axis(ordered, (last // 2)[..., None], axis=-1)
    high = np.take_along_axis(ordered, ((last + 1) // 2)[..., None], axis=-1)
    return ((low + high) / 2)[..., 0]
