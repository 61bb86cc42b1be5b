"""Stage 2: the patch learns to prefer the teacher's response to the base's, and anchors keep the text whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from policypatch.data.datamodule import Batch
from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone
from policypatch.train.figures import Figure
from policypatch.train.losses import dpo_loss, mean_nll, sequence_lengths
from policypatch.train.module import Optimisation
from policypatch.train.pair_stage import PairStage, Weights


@dataclass(frozen=True)
class PreferenceSettings:
    """What the DPO loss is made of. Every field is a config key of the stage.

    Attributes:
        beta: strength of the pull towards the reference.
        nll_weight: weight of the NLL per token of the chosen response, the anchor that keeps the text whole.
        label_smoothing: share of pairs assumed to be labelled the wrong way round.
    """

    beta: float
    nll_weight: float = 0.0
    label_smoothing: float = 0.0


class DPOModule(PairStage):
    """Direct preference optimisation; the reference's log-probabilities come with the batch, computed once.

    But those of a patch that is trained in company, whose reference stands in the same company (`CompanyBackbone`).
    """

    stage = "dpo"

    def __init__(
        self,
        backbone: PrefixBackbone,
        optimisation: Optimisation,
        preference: PreferenceSettings,
        weights: Weights | None = None,
    ):
        super().__init__(backbone, optimisation, weights)
        if preference.beta <= 0:
            raise PolicyPatchError(f"dpo.beta is {preference.beta}: it must be greater than 0")
        self.preference = preference

    def objective(self, batch: Batch, logprobs: Tensor) -> dict[str, Figure]:
        """The parts of the loss, the share of pairs ranked right, and the reward margin.

        A row without a rejected side (a benign one) has no preference; its chosen side is anchored all the same.
        """
        p = self.preference
        if batch.reference is None:
            raise PolicyPatchError("DPO needs the reference's log-probabilities: compute them before the stage")
        lengths = sequence_lengths(batch.tree.sequence, batch.tree.sequences)
        nll = mean_nll(logprobs[batch.chosen], lengths[batch.chosen]).mean()
        figures = {"nll_chosen": Figure(nll, len(batch.pairs), p.nll_weight)}
        paired = (batch.rejected >= 0).nonzero()[:, 0]
        if len(paired):
            chosen, rejected = logprobs[batch.chosen[paired]], logprobs[batch.rejected[paired]]
            reference = batch.reference[paired]
            if (live := self.backbone.reference_logprobs(batch.tree)) is not None:
                reference = torch.stack([live[batch.chosen[paired]], live[batch.rejected[paired]]], 1)
            found = dpo_loss(chosen, rejected, reference[:, 0], reference[:, 1], p.beta, p.label_smoothing)
            margin = found.chosen_reward - found.rejected_reward
            told = {
                "margin": margin.mean(),
                "accuracy": (margin > 0).float().mean(),
                "chosen_reward": found.chosen_reward.mean(),
                "rejected_reward": found.rejected_reward.mean(),
            }
            figures["preference_loss"] = Figure(found.loss.mean(), len(paired), 1.0)
            figures |= {name: Figure(value, len(paired)) for name, value in told.items()}
        return figures
