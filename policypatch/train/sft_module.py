"""Stage 1: the patch learns the teacher's responses, token by token."""

from __future__ import annotations

from torch import Tensor

from policypatch.data.datamodule import Batch
from policypatch.train.figures import Figure
from policypatch.train.losses import sequence_lengths, sft_loss
from policypatch.train.pair_stage import PairStage


class SFTModule(PairStage):
    """Cross-entropy on the chosen responses, over completion tokens only."""

    stage = "sft"

    def objective(self, batch: Batch, logprobs: Tensor) -> dict[str, Figure]:
        """Mean over responses of the NLL per token."""
        lengths = sequence_lengths(batch.tree.sequence, batch.tree.sequences)
        nll = sft_loss(logprobs[batch.chosen], lengths[batch.chosen])
        return {"nll_chosen": Figure(nll, len(batch.pairs), 1.0)}
