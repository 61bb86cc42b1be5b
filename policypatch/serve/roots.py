"""What requests begin with, read once: a stack of patches, and what its last prompts had in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from policypatch.model.base import Base
from policypatch.model.tree import common_prefix
from policypatch.serve.slots import prefix_cache

STACKS = 64  # orders of patches whose last prompt is known
WORTH = 8  # tokens that prompts must share beyond what is known before that is computed apart


class Roots:
    """Keys and values of beginnings, computed when they are first asked for; those asked for long ago are dropped.

    Args:
        base: loaded.
        patches: vectors (L, D) by name.
        room: positions kept in all, but for the last beginning, which is kept whatever its length.
    """

    def __init__(self, base: Base, patches: Mapping[str, Tensor], room: int):
        self.base, self.patches, self.room = base, patches, room
        self._kept: dict[tuple[tuple[str, ...], tuple[int, ...]], DynamicCache] = {}
        self._last: dict[tuple[str, ...], Sequence[int]] = {}

    def of(self, stack: tuple[str, ...], prompt: Sequence[int]) -> tuple[DynamicCache | None, int]:
        """The stack and the longest known beginning of the prompt, and how many of its tokens that has.

        What a stack's last two prompts began with (a chat's system message) is taken for what the next ones begin with.
        The prompt's last token is never part of it: its state predicts the first new one.
        """
        last = self._last.pop(stack, ())
        self._last[stack] = prompt
        while len(self._last) > STACKS:
            del self._last[next(iter(self._last))]
        common = min(common_prefix([prompt, last]), len(prompt) - 1)
        known = [key for key in self._kept if key[0] == stack and tuple(prompt[: len(key[1])]) == key[1]]
        best = max(known, key=lambda key: len(key[1]), default=(stack, ()))
        best = (stack, best[1] if len(best[1]) < len(prompt) else ())
        if common >= len(best[1]) + WORTH:
            best = (stack, tuple(prompt[:common]))
        if best == ((), ()):
            return None, 0
        root = self._kept.pop(best, None)
        self._kept[best] = root = self._read(*best) if root is None else root
        while len(self._kept) > 1 and sum(map(_length, self._kept.values())) > self.room:
            del self._kept[next(iter(self._kept))]
        return root, len(best[1])

    def _read(self, stack: tuple[str, ...], tokens: tuple[int, ...]) -> DynamicCache:
        model = self.base.model
        parts = [self.patches[name].to(model.device, model.dtype) for name in stack]
        parts.append(model.get_input_embeddings()(torch.tensor(tokens, dtype=torch.long, device=model.device)))
        return prefix_cache(model, torch.cat(parts))


def _length(prefix: DynamicCache) -> int:
    return int(prefix.get_seq_length())
