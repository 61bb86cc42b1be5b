"""What SFT and DPO share: log-probabilities of completions, and what the loss has beside the stage's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from policypatch.data.datamodule import Batch
from policypatch.model.backbone import PrefixBackbone, sum_by_sequence
from policypatch.train.figures import Figure, with_loss
from policypatch.train.losses import balance_loss
from policypatch.train.module import Optimisation, StageModule


@dataclass(frozen=True)
class Weights:
    """Of what both stages' losses have beside their own; 0 leaves a part out.

    Attributes:
        kl: the anchor: KL(base || patched) per token on the rows that a batch anchors (its benign ones), as MOSAIC
            (arXiv 2603.16210) keeps a prefix from changing what it need not.
        texts: the same on the batch's benign texts.
        balance: how far the completions of balanced rows are from being equally likely (`balance_loss`).
    """

    kl: float = 0.0
    texts: float = 0.0
    balance: float = 0.0


class PairStage(StageModule):
    """See `StageModule`. Subclasses say what a stage's own loss is.

    Args:
        backbone, optimisation: see there.
        weights: of what the loss has beside that.
    """

    def __init__(self, backbone: PrefixBackbone, optimisation: Optimisation, weights: Weights | None = None):
        super().__init__(backbone, optimisation)
        self.weights = weights or Weights()

    @abstractmethod
    def objective(self, batch: Batch, logprobs: Tensor) -> dict[str, Figure]:
        """The figures of the stage's own loss from each completion's log-probability (S,)."""

    def losses(self, batch: Batch) -> Mapping[str, Figure]:
        """The figures of a batch; `loss` is the one to minimise."""
        logprobs, kl = self.forward_batch(batch)
        figures = self.objective(batch, logprobs)
        for name, (weight, values) in self._beside(batch, kl).items():
            figures[name] = Figure(values.mean(), len(values), weight)
        return with_loss(figures, len(batch.pairs))

    def _beside(self, batch: Batch, kl: Tensor | None) -> dict[str, tuple[float, Tensor]]:
        """What the loss has beside the stage's own: weight, and a value for each row that it concerns."""
        found: dict[str, tuple[float, Tensor]] = {}
        if kl is not None:
            found["kl_base"] = self.weights.kl, kl
        if self.weights.texts and batch.texts is not None:
            found["kl_texts"] = self.weights.texts, self.backbone.divergence(batch.texts)
        if self.weights.balance and batch.balanced is not None:
            first, second = self.backbone.sequence_logprobs(batch.balanced).view(-1, 2).unbind(1)
            found["imbalance"] = self.weights.balance, balance_loss(first, second)
        return found

    def forward_batch(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Summed log-probability of each completion (S,), and KL per token of each anchored row (K,) or None."""
        tree = batch.tree
        if not self.weights.kl or batch.anchor is None:
            return sum_by_sequence(self.backbone.completion_logprobs(tree), tree), None
        logprobs, kl = self.backbone.completion_logprobs_and_kl(tree, batch.anchor.tree, batch.anchor.sequences)
        return sum_by_sequence(logprobs, tree), kl
