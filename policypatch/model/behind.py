"""A cache layer that stands behind a stack in one piece of memory, so that attention over both copies nothing.

To everything but the attention of `policypatch.model.in_front` it is transformers' DynamicLayer: its keys and values
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

from policypatch.errors import PolicyPatchError

ROOM = 64  # columns kept free at least, when a buffer is made
Front = tuple[Tensor, Tensor, Tensor | None]  # keys and values (B, heads, L, d), and (B, L) which of them a row has
Fronts = Callable[[int, int], Front | None]  # of a layer and a batch
WHOLE = "policypatch_whole"  # attribute of the keys that `update` gives out: the values beside them, and the slices


class BehindLayer(DynamicLayer):
    """One layer.

    Args:
        fronts: what stands before; None where nothing does, and the same object while it is the same.
        number: of the layer.
        old: the layer that it takes the place of, whose tokens were read behind the same.
    """

    def __init__(self, fronts: Fronts, number: int, old: DynamicLayer | None = None):
        super().__init__()
        self.fronts, self._number = fronts, number
        self._front: Front | None = None
        self._filled_behind = False  # a stack stood in front when the last tokens came
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None  # the slices of the buffers that keys and values were last
        self._slots: list[tuple[Tensor, ...]] | None = None  # the buffers' columns from `_first` on, one by one
        self._first = 0
        if old is not None and old.is_initialized:
            self.keys, self.values = old.keys, old.values
            self.dtype, self.device, self.is_initialized, self._filled_behind = old.dtype, old.device, True, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens' keys and values (B, heads, T, d); all tokens'.

        Raises:
            PolicyPatchError: the stack was removed from the model since, and there are tokens that were read behind it.
        """
        front = self.fronts(self._number, key_states.shape[0])
        if front is None and self._filled_behind and self.get_seq_length():
            raise PolicyPatchError(
                "past_key_values was filled behind a stack of patches that was removed since: start a new cache"
            )
        self._filled_behind = front is not None
        learns = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if front is None or learns:
            self._front = self._buffers = self._shown = self._slots = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new, length = self.get_seq_length(), key_states.shape[2], front[0].shape[2]
        end, buffers = length + old + new, self._buffers
        # Somebody may have cut, reordered or replaced the tensors, or put another stack in front: begin anew then.
        mine = self._shown is not None and self.keys is self._shown[0] and self.values is self._shown[1]
        if (
            buffers is None
            or not mine
            or self._front is not front
            or end > buffers[0].shape[2]
            or (buffers[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            buffers = (
                _buffer(front[0], self.keys, old, key_states, end),
                _buffer(front[1], self.values, old, value_states, end),
            )
            self._buffers, self._front, self._slots = buffers, front, None
        # What follows is done for every token in every layer, and a view of a tensor costs more than its arithmetic: so
        # narrow, not [:, :, a:b], and the columns of the next tokens at once.
        if new == 1:
            if self._slots is None or end > self._first + len(self._slots[0]):
                self._first = end - 1
                columns = min(ROOM, buffers[0].shape[2] - self._first)
                self._slots = [buffer.narrow(2, self._first, columns).split(1, 2) for buffer in buffers]
            self._slots[0][end - 1 - self._first].copy_(key_states)
            self._slots[1][end - 1 - self._first].copy_(value_states)
        else:
            buffers[0].narrow(2, length + old, new).copy_(key_states)
            buffers[1].narrow(2, length + old, new).copy_(value_states)
        self.keys, self.values = buffers[0].narrow(2, length, old + new), buffers[1].narrow(2, length, old + new)
        self._shown = self.keys, self.values
        setattr(self.keys, WHOLE, (self.values, buffers[0].narrow(2, 0, end), buffers[1].narrow(2, 0, end)))
        return self._shown

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or a file, has the tokens alone."""
        if not self.is_initialized:
            return DynamicLayer, ()
        return _plain, (self.keys.clone(), self.values.clone())


def whole_of(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """The stack's keys and values and then these, where these are what a layer's `update` gave out together."""
    found = getattr(keys, WHOLE, None)
    return found[1:] if found is not None and found[0] is values else None


def adopt(cache: Any, fronts: Fronts, layers: int) -> None:
    """Have a cache's layers stand behind a stack; other kinds (static, sliding, quantised) stay as they are."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if not cache.layers:
        cache.layers = [BehindLayer(fronts, number) for number in range(layers)]
    for number, layer in enumerate(cache.layers):
        # One of ours may stand behind what was in front before, or in front of another model.
        if type(layer) is DynamicLayer or (type(layer) is BehindLayer and layer.fronts != fronts):
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
