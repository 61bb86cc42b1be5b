"""A training step of policypatch: forward, backward, AdamW; the reference's log-probabilities as a sweep finds them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.workload import BETA, LEARNING_RATE, Workload
from policypatch.data.datamodule import Batch, PairData
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.train.dpo_module import DPOModule, PreferenceSettings
from policypatch.train.module import Optimisation, StageModule
from policypatch.train.sft_module import SFTModule

ROW_TOKENS = 512


class Ours:
    """One stage on a base.

    Args:
        base: loaded.
        work: what a step is.
        stage: `sft` or `dpo`.
        steps: different batches, which are taken in order and then again.
    """

    def __init__(self, base: Base, work: Workload, stage: str, steps: int = 1):
        self.backbone = PrefixBackbone(base.model, work.vectors(base), ROW_TOKENS)
        optimisation = Optimisation(steps, LEARNING_RATE, warmup=0.0, decay="constant")
        self.module: StageModule
        if stage == "dpo":
            self.module = DPOModule(self.backbone, optimisation, PreferenceSettings(BETA))
        else:
            self.module = SFTModule(self.backbone, optimisation)
        examples = work.examples(base, steps)
        completions = 2 if stage == "dpo" else 1
        data = PairData(examples, work.pairs, steps, 0, completions, self.backbone.tree)
        if stage == "dpo":
            data.reference = self._reference(base, data, len(examples))
        numbers = range(0, len(examples), work.pairs)
        self._batches: list[Callable[[], Batch]] = [
            lambda first=first: data.batch(range(first, first + work.pairs)) for first in numbers
        ]
        self.optimiser = torch.optim.AdamW(self.module.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self._step = 0

    @property
    def vectors(self) -> Tensor:
        """(P, D) that are trained."""
        return self.backbone.patch

    def step(self) -> float:
        """The loss before the step."""
        loss = self.backward()
        self.optimiser.step()
        self._step += 1
        return loss

    def backward(self) -> float:
        """The loss of the batch whose turn it is; its gradient is in `vectors` then, and nothing has moved.

        The batch is packed anew, as in a run.
        """
        self.optimiser.zero_grad()
        loss = self.module.losses(self.batch())["loss"].value
        loss.backward()
        return float(loss.detach())

    def batch(self) -> Batch:
        """The one whose turn it is."""
        return self._batches[self._step % len(self._batches)]()

    @torch.no_grad()
    def _reference(self, base: Base, data: PairData, pairs: int) -> Tensor:
        """(pairs, 2) of the base alone, as TRL takes it for an adapter."""
        plain = PrefixBackbone(base.model, base.embedding[:0], ROW_TOKENS)
        items = [data.examples[i].item for i in range(pairs)]
        parts = [plain.sequence_logprobs(plain.tree(items[i : i + 8])) for i in range(0, pairs, 8)]
        return torch.cat(parts).view(-1, 2)
