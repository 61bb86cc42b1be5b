"""Keys and values of the requests that are being answered, a slot for each, in room reserved once.

Requests come and go and have read different numbers of tokens. The slots in use are always the first ones, so that a
forward sees them as a slice and nothing is copied; each row's mask and positions say how far it has come.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from policypatch.model.head import finish_logits
from policypatch.model.parts import decoder_of


class _Window(DynamicLayer):
    """The slots of one layer that a forward writes to and reads: rows `first` to `last`, each from its `start` on."""

    def __init__(self, keys: Tensor, values: Tensor, starts: Tensor, longest: int):
        super().__init__()
        self.keys, self.values, self.starts, self.longest = keys, values, starts, longest
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        rows, _, new, _ = key_states.shape
        at = self.starts[:, None] + torch.arange(new, device=self.starts.device)
        row = torch.arange(rows, device=at.device)[:, None]
        self.keys[row, :, at] = key_states.transpose(1, 2)
        self.values[row, :, at] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]

    def get_seq_length(self) -> int:
        return self.longest


class Slots:
    """Room for `rows` sequences of up to `context` positions.

    What a row has not read is masked, yet a NaN there would get through (0 x NaN): room begins as zeros and is left so.

    Memory: rows x context x layers x key-value heads x head width x 2 numbers; 46 kB a position for the default base in
    float32. On a CPU the operating system hands it out page by page as it is first written to: a row takes what the
    longest request took that ever stood in it. On a GPU all of it is taken at once.
    """

    def __init__(self, model: PreTrainedModel, rows: int, context: int):
        self.model, self.context = model, context
        self.lengths: list[int] = []  # what each slot in use has read
        example = prefix_cache(model, model.get_input_embeddings().weight[:1]).layers
        self._keys = [self._room(layer.keys, rows) for layer in example]
        self._values = [self._room(layer.values, rows) for layer in example]
        self.rows = rows

    def _room(self, like: Tensor, rows: int) -> Tensor:
        shape = (rows, like.shape[1], self.context, like.shape[3])
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        return _zeros_unwritten(math.prod(shape) * like.element_size()).view(like.dtype).view(shape)

    @torch.inference_mode()
    def enter(self, prefix: DynamicCache | None, tokens: Sequence[int]) -> Tensor:
        """Take the next slot and read a prompt behind a stack.

        Args:
            prefix: keys and values of the stack; None is the plain base.
            tokens: of the prompt, one at least.

        Returns:
            logits (V,) float32 of the first new token.
        """
        slot = len(self.lengths)
        length = 0 if prefix is None else prefix.get_seq_length()
        if prefix is not None:
            for keys, values, layer in zip(self._keys, self._values, prefix.layers, strict=True):
                keys[slot, :, :length], values[slot, :, :length] = layer.keys[0], layer.values[0]
        self.lengths.append(length)
        try:
            ids = torch.tensor([list(tokens)], device=self.model.device)
            return self._forward(slot, slot + 1, ids)[0]
        except BaseException:
            self.lengths[slot] = min(length + len(tokens), self.context)  # some of it may have been written
            self.leave(slot)
            raise

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one token a slot; logits (B, V) float32 of the next ones."""
        try:
            return self._forward(0, len(self.lengths), torch.tensor(tokens, device=self.model.device)[:, None])
        except BaseException:
            self.lengths = [min(length + 1, self.context) for length in self.lengths]  # for `leave` to clear
            raise

    def leave(self, slot: int) -> int:
        """Give a slot back; the number of the slot that was moved into it (itself, where it was the last)."""
        last = len(self.lengths) - 1
        before, length = self.lengths[slot], self.lengths[last]
        for room in (*self._keys, *self._values):
            if slot != last:
                room[slot, :, :length] = room[last, :, :length]
                room[slot, :, length:before] = 0
            room[last, :, :length] = 0
        self.lengths[slot] = length
        self.lengths.pop()
        return last

    def _forward(self, first: int, last: int, ids: Tensor) -> Tensor:
        model, new = self.model, ids.shape[1]
        starts = torch.tensor(self.lengths[first:last], device=model.device)
        longest = int(starts.max()) + new
        positions = starts[:, None] + torch.arange(new, device=model.device)
        seen = torch.arange(longest, device=model.device)[None, None] <= positions[:, :, None]
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
        mask = mask.masked_fill_(~seen, torch.finfo(model.dtype).min)[:, None]
        cache = DynamicCache()
        cache.layers = [
            _Window(keys[first:last], values[first:last], starts, longest)
            for keys, values in zip(self._keys, self._values, strict=True)
        ]
        states = decoder_of(model)(
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        for slot in range(first, last):
            self.lengths[slot] += new
        return finish_logits(model, model.get_output_embeddings()(states)).float()


def _zeros_unwritten(size: int) -> Tensor:
    """Zeros, uint8 (size,), in pages from the system that take no memory until they are written to.

    torch.zeros writes them. numpy's zeros ask for huge pages, one of which (2 MB) holds a whole row of a layer's keys:
    with the first tokens of a request they take the memory of a whole context.
    """
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel that has no huge pages does not know the advice
            room.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)


@torch.inference_mode()
def prefix_cache(model: PreTrainedModel, vectors: Tensor) -> DynamicCache:
    """Keys and values of vectors (L, D) at positions 0 to L-1."""
    cache = DynamicCache()
    embeddings = vectors.to(model.device, model.dtype)[None]
    decoder_of(model)(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    return cache
