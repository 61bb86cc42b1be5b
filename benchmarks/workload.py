"""The batch that is timed: pairs of token ids and a patch's starting vectors, the same for every side."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policypatch.model.base import Base
from policypatch.model.tree import Item

BETA, LEARNING_RATE = 0.1, 1e-3
# AdamW's. Its first step is the learning rate in the direction of the sign of the gradient, also where that is rounding
# noise, of which the two sides have different ones; a step of noise is small with this.
EPS = 1e-5


@dataclass(frozen=True)
class Workload:
    """How much of what.

    Attributes:
        pairs: a step.
        prompt: tokens of a prompt, on average; each has up to a quarter more or less.
        completion: tokens of each completion. All are as long, as TRL's SFT weighs tokens and ours rows.
        patch: vectors.
    """

    pairs: int = 8
    prompt: int = 14
    completion: int = 19
    patch: int = 50

    def items(self, base: Base, steps: int = 1) -> list[Item]:
        """`steps` batches of pairs (chosen, rejected), of tokens drawn from the vocabulary."""
        random = torch.Generator().manual_seed(0)
        known = min(len(base.tokenizer), base.embedding.shape[0])

        def draw(n: int) -> tuple[int, ...]:
            return tuple(torch.randint(0, known, (n,), generator=random).tolist())

        def item() -> Item:
            most = self.prompt // 4
            length = self.prompt + int(torch.randint(-most, most + 1, (1,), generator=random))
            return Item(draw(length), (draw(self.completion), draw(self.completion)))

        return [item() for _ in range(self.pairs * steps)]

    def vectors(self, base: Base) -> Tensor:
        """(P, D) embeddings of words, as a patch begins."""
        random = torch.Generator().manual_seed(1)
        words = torch.randint(0, len(base.embedding), (self.patch,), generator=random)
        return base.embedding[words].detach().float().clone()

    def __str__(self) -> str:
        """In words."""
        return f"{self.pairs} pairs, prompts of {self.prompt}, completions of {self.completion}, patch of {self.patch}"

    def but(self, **changes: int) -> Workload:
        """The same with something changed."""
        return replace(self, **changes)
