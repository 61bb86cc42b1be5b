"""The losses of both stages, as pure functions of log-probabilities.

Shapes: S completions, B pairs, N completion tokens. All sums run over completion tokens only: neither the patch nor
the prompt is ever a target. Every loss is a mean over completions or pairs of a figure of each one alone, so that a
batch split in two and averaged gives the same number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """What a DPO step yields: loss (B,), and the implicit rewards (B,) of chosen and rejected, without gradient."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def mean_nll(sequence_logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Negative log-likelihood per token of each completion: (S,).

    Args:
        sequence_logprobs: (S,) summed log-probabilities.
        lengths: (S,) number of tokens.
    """
    return -sequence_logprobs / lengths


def sft_loss(sequence_logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Stage 1: cross-entropy on the teacher's responses, token by token (arXiv 2511.08484, stage 1). Scalar."""
    return mean_nll(sequence_logprobs, lengths).mean()


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Stage 2: direct preference optimisation (Rafailov et al. 2023, Eq. 7; arXiv 2511.08484, Eq. 3).

    `-log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))`, with `label_smoothing`
    the share of pairs assumed to be labelled the wrong way round (conservative DPO).

    Args:
        chosen: (B,) summed log-probability of the chosen completions under the patched base.
        rejected: (B,) of the rejected ones.
        reference_chosen: (B,) of the chosen ones under the reference.
        reference_rejected: (B,) of the rejected ones under the reference.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: in [0, 0.5).
    """
    chosen_reward = beta * (chosen - reference_chosen)
    rejected_reward = beta * (rejected - reference_rejected)
    margin = chosen_reward - rejected_reward
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return PreferenceLoss(loss, chosen_reward.detach(), rejected_reward.detach())


def balance_loss(first: Tensor, second: Tensor) -> Tensor:
    """How far two completions are from being equally likely: (B,), 0 where they are.

    `-1/2 log sigmoid(d) - 1/2 log sigmoid(-d) - log 2` with d the difference of their log-probabilities. It is DPO's
    loss (Rafailov et al. 2023, Eq. 7, beta 1) for labels that prefer either side half of the time, under a reference
    that finds both equally likely; for large |d| it is `|d| / 2 - log 2`, in its shape the gender-equalising loss
    `|log P(f) / P(m)|` of Qian et al. 2019 (arXiv 1905.12801, Eq. 2).

    Args:
        first, second: (B,) summed log-probabilities under the patched base.
    """
    difference = first - second
    return -0.5 * (F.logsigmoid(difference) + F.logsigmoid(-difference)) - math.log(2)


def sequence_lengths(sequence: Tensor, sequences: int) -> Tensor:
    """(S,) tokens of each completion, from the (N,) index of the completion each token belongs to."""
    return torch.bincount(sequence, minlength=sequences)
