"""A patch trained in company: at each step it stands among some of its companions, patches that stay as they are.

Prefixes that were trained apart compose badly (MOSAIC, arXiv 2603.16210): each has only ever stood next to the prompt.
Here the companions of a step, their order and the trainable patch's place among them are drawn, and each companion is
left out with some probability, so that the patch works alone as well as before and behind any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policypatch.model.backbone import PrefixBackbone, sum_by_sequence
from policypatch.model.head import token_logprobs
from policypatch.model.tree import Tree


class CompanyBackbone(PrefixBackbone):
    """See `PrefixBackbone`; outside of training steps the patch stands alone.

    Args:
        model, vectors, max_row_tokens: see there.
        companions: (P_i, D) each, frozen.
        dropout: probability that a companion is left out of a step.
        seed: with the step's number it fixes what is drawn, on every rank the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vectors: Tensor,
        max_row_tokens: int,
        companions: Sequence[Tensor],
        dropout: float,
        seed: int,
    ):
        super().__init__(model, vectors, max_row_tokens)
        self._companions = [companion.detach().float() for companion in companions]  # no part of a checkpoint
        self.dropout, self.seed = dropout, seed
        self._before: list[Tensor] = []
        self._behind: list[Tensor] = []

    def begin(self, step: int | None) -> None:
        """Draw the company of a training step; None is no training, where the patch stands alone.

        What a patch in company is held to is the base behind its companions.
        """
        before, behind = ([], []) if step is None else drawn(len(self._companions), self.dropout, self.seed, step)
        here = self.patch.device
        self._before = [self._companions[i].to(here) for i in before]
        self._behind = [self._companions[i].to(here) for i in behind]
        self.anchor = torch.cat([*self._before, self.patch.detach()[:0], *self._behind])

    def hidden(self, tree: Tree) -> Tensor:
        """Last hidden states where a completion token is predicted, behind the patch in company: (N, D)."""
        return self._hidden(tree, self._among(self.patch))

    @torch.no_grad()
    def reference_logprobs(self, tree: Tree) -> Tensor | None:
        """(S,) of the reference in the company of this step, so that a margin holds nothing of what that brings."""
        if self.reference is None or not (self._before or self._behind):
            return None
        states = self._hidden(tree, self._among(self.reference.to(self.patch.device)))
        return sum_by_sequence(token_logprobs(self.model, states, tree.targets, self.head_logits), tree)

    def _among(self, vectors: Tensor) -> Tensor:
        return torch.cat([*self._before, vectors, *self._behind])


def drawn(companions: int, dropout: float, seed: int, step: int) -> tuple[list[int], list[int]]:
    """Numbers of the companions that stand before and behind the patch at a step, in their order.

    Args:
        companions: how many there are.
        dropout: probability that each is left out.
        seed: of all steps.
        step: from 0.
    """
    random = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    order = torch.randperm(companions, generator=random).tolist()
    there = (torch.rand(companions, generator=random) >= dropout).tolist()
    present = [i for i in order if there[i]]
    place = int(torch.randint(len(present) + 1, (1,), generator=random))
    return present[:place], present[place:]
