"""A cache layer that stands behind a stack in one piece of memory, so that attention over both copies nothing.

To everything but the attention of `policypatch.model.applied` it is transformers' DynamicLayer: its keys and values
are those of the model's own tokens. They lie in a buffer whose first columns are the stack's and whose end has room, so
a token is written in place where DynamicLayer copies all that was there before, and what attention reads, the stack
and the tokens, is one slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # columns kept free at least, when a buffer is made
Fronts = Callable[[int, int], tuple[Tensor, Tensor] | None]  # (layer, batch) -> keys and values (B, heads, L, d)


class BehindLayer(DynamicLayer):
    """One layer.

    Args:
        fronts: what stands before; None where nothing does.
        number: of the layer.
        old: the layer that it takes the place of.
    """

    def __init__(self, fronts: Fronts, number: int, old: DynamicLayer | None = None):
        super().__init__()
        self._fronts, self._number = fronts, number
        self._front: tuple[Tensor, Tensor] | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None  # the slices of the buffers that keys and values were last
        if old is not None and old.is_initialized:
            self.keys, self.values = old.keys, old.values
            self.dtype, self.device, self.is_initialized = old.dtype, old.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens' keys and values (B, heads, T, d); all tokens'."""
        front = self._fronts(self._number, key_states.shape[0])
        if front is None or (torch.is_grad_enabled() and key_states.requires_grad):
            self._front = self._buffers = self._shown = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        before, end = front[0].shape[2] + old, front[0].shape[2] + old + key_states.shape[2]
        # Somebody may have cut, reordered or replaced the tensors, or put another stack in front: begin anew then.
        mine = self._shown is not None and self.keys is self._shown[0] and self.values is self._shown[1]
        same = self._front is not None and self._front[0] is front[0] and self._front[1] is front[1]
        fixed = self._buffers is not None and self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if not (mine and same) or self._buffers is None or fixed or end > self._buffers[0].shape[2]:
            self._buffers = (
                _buffer(front[0], self.keys, old, key_states, end),
                _buffer(front[1], self.values, old, value_states, end),
            )
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:end] = states
        self._front = front
        self.keys, self.values = (buffer[:, :, front[0].shape[2] : end] for buffer in self._buffers)
        self._shown = self.keys, self.values
        return self._shown

    def whole(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """The stack's keys and values and then these, where these are what `update` last gave out."""
        if self._shown is None or self._buffers is None or keys is not self._shown[0] or values is not self._shown[1]:
            return None
        assert self._front is not None
        end = self._front[0].shape[2] + keys.shape[2]
        return self._buffers[0][:, :, :end], self._buffers[1][:, :, :end]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or a file, has the tokens alone."""
        if not self.is_initialized:
            return DynamicLayer, ()
        return _plain, (self.keys.clone(), self.values.clone())


def adopt(cache: Any, fronts: Fronts, layers: int) -> None:
    """Have a cache's layers stand behind a stack; other kinds (static, sliding, quantised) stay as they are."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if not cache.layers:
        cache.layers = [BehindLayer(fronts, number) for number in range(layers)]
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = BehindLayer(fronts, number, layer)


def _buffer(front: Tensor, own: Tensor, old: int, like: Tensor, end: int) -> Tensor:
    """Room for `end` columns and more, with the stack and the tokens that were there in it."""
    rows, heads, _, width = like.shape
    buffer = like.new_empty(rows, heads, end + max(ROOM, end // 2), width)
    buffer[:, :, : front.shape[2]] = front
    if old:
        buffer[:, :, front.shape[2] : front.shape[2] + old] = own
    return buffer


def _plain(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return layer
