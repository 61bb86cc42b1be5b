"""One side of a comparison: a training stage that takes a step at a time, over batches in a fixed order."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from benchmarks.workload import EPS, LEARNING_RATE


class Side(ABC):
    """A stage on a base.

    Args:
        vectors: (P, D) that are trained.
        batches: how many different ones there are; they are taken in order and then again.
    """

    def __init__(self, vectors: Tensor, batches: int):
        self.vectors, self._batches, self._taken = vectors, batches, 0
        self._optimiser = torch.optim.AdamW([vectors], lr=LEARNING_RATE, eps=EPS, weight_decay=0.0)

    @abstractmethod
    def loss_of(self, batch: int) -> float:
        """The loss of a batch, by its number, with its gradient added to that of `vectors`."""

    def step(self, batch: int | None = None) -> float:
        """The loss before the step, on the batch of this number or on the one whose turn it is."""
        loss = self.backward(batch)
        self._optimiser.step()
        self._taken += 1
        return loss

    def backward(self, batch: int | None = None) -> float:
        """The loss of that batch; its gradient is in `vectors` then, and nothing has moved."""
        self._optimiser.zero_grad()
        return self.loss_of((self._taken if batch is None else batch) % self._batches)
