"""Stage 2: the patch learns to prefer the teacher's response to the base's, and two anchors keep the text whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from policypatch.data.datamodule import Batch
from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone, sum_by_sequence
from policypatch.train.losses import dpo_loss, mean_nll, sequence_lengths
from policypatch.train.module import Optimisation, StageModule


@dataclass(frozen=True)
class PreferenceSettings:
    """What the DPO loss is made of. Every field is a config key of the stage.

    Attributes:
        beta: strength of the pull towards the reference.
        nll_weight: weight of the NLL per token of the chosen response, the anchor that keeps the text whole.
        kl_weight: weight of KL(base || patched) per token on the chosen response, the anchor to the base.
        label_smoothing: share of pairs assumed to be labelled the wrong way round.
    """

    beta: float
    nll_weight: float = 0.0
    kl_weight: float = 0.0
    label_smoothing: float = 0.0


class DPOModule(StageModule):
    """Direct preference optimisation; the reference's log-probabilities come with the batch, computed once."""

    stage = "dpo"

    def __init__(self, backbone: PrefixBackbone, optimisation: Optimisation, preference: PreferenceSettings):
        super().__init__(backbone, optimisation)
        if preference.beta <= 0:
            raise PolicyPatchError(f"dpo.beta is {preference.beta}: it must be greater than 0")
        self.preference = preference

    def losses(self, batch: Batch) -> Mapping[str, Tensor]:
        """`loss`, its parts, the share of pairs ranked right, and the reward margin."""
        p, tree = self.preference, batch.tree
        if batch.reference is None:
            raise PolicyPatchError("DPO needs the reference's log-probabilities: compute them before the stage")
        if p.kl_weight:
            token_logprobs, kl = self.backbone.completion_logprobs_and_kl(tree)
        else:
            token_logprobs, kl = self.backbone.completion_logprobs(tree), None
        logprobs = sum_by_sequence(token_logprobs, tree)
        lengths = sequence_lengths(tree.sequence, tree.sequences)
        chosen, rejected = logprobs[0::2], logprobs[1::2]  # each pair's completions: chosen, rejected
        preference = dpo_loss(chosen, rejected, batch.reference[:, 0], batch.reference[:, 1], p.beta, p.label_smoothing)
        nll = mean_nll(chosen, lengths[0::2]).mean()
        loss = preference.loss.mean() + p.nll_weight * nll
        margin = preference.chosen_reward - preference.rejected_reward
        figures = {
            "preference_loss": preference.loss.mean(),
            "nll_chosen": nll,
            "margin": margin.mean(),
            "accuracy": (margin > 0).float().mean(),
            "chosen_reward": preference.chosen_reward.mean(),
            "rejected_reward": preference.rejected_reward.mean(),
        }
        if kl is not None:
            on_chosen = (sum_by_sequence(kl, tree) / lengths)[0::2].mean()
            loss = loss + p.kl_weight * on_chosen
            figures["kl_base"] = on_chosen
        return {"loss": loss, **figures}
