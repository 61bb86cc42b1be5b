"""Stage 1: the patch learns the teacher's responses, token by token."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from policypatch.data.datamodule import Batch
from policypatch.model.backbone import sum_by_sequence
from policypatch.train.losses import sequence_lengths, sft_loss
from policypatch.train.module import StageModule


class SFTModule(StageModule):
    """Cross-entropy on the chosen responses, over completion tokens only."""

    stage = "sft"

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """`loss`: mean over responses of the NLL per token."""
        tree = batch.tree
        logprobs = sum_by_sequence(self.backbone.completion_logprobs(tree), tree)
        return {"loss": sft_loss(logprobs, sequence_lengths(tree.sequence, tree.sequences))}
