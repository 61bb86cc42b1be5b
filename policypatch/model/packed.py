"""A packed tree through the layers of a frozen LM: rows of tokens over one root that all of them see.

Nothing that a layer is given over the rows changes while it runs, so that its activations may be computed again in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from policypatch.errors import PolicyPatchError
from policypatch.model.parts import decoder_of, layers_of

COMPILED = "_policypatch_compiled"  # a layer's attribute


def packed_states(
    model: PreTrainedModel,
    root: Tensor,
    embeddings: Tensor,
    positions: Tensor,
    allowed: Tensor,
    recompute: bool,
    compiled: bool = False,
) -> Tensor:
    """Last hidden states (R, n + T, D) of a root and R rows over it.

    Args:
        model: the frozen LM.
        root: (n, D) input embeddings at positions 0..n-1, which every row sees; n may be 0.
        embeddings: (R, T, D) of the rows' tokens.
        positions: (R, T) of these.
        allowed: (R, T, T) bool, what a token sees of its own row.
        recompute: the rows' activations are computed again in the backward pass rather than kept.
        compiled: layers run as torch.compile makes them, where root and tokens stand in one row: a cache in between
            would be compiled anew for every length.

    Raises:
        PolicyPatchError: one of these, and the model's layers are not known.
    """
    training = torch.is_grad_enabled()
    if len(allowed) == 1 or len(root) == 0:
        with _other_forwards(model, recompute and training, compiled and training):
            return _one_pass(model, root, embeddings, positions, allowed)
    first, behind = _root_pass(model, root)
    with _other_forwards(model, recompute and training, compiled=False):
        states = _rows_pass(model, behind, embeddings, positions, allowed)
    return torch.cat([first.expand(len(allowed), -1, -1), states], 1)


def _one_pass(model: PreTrainedModel, root: Tensor, embeddings: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
    """Root and tokens in the same row."""
    rows, width, n = *allowed.shape[:2], root.shape[0]
    full = torch.zeros(rows, n + width, n + width, dtype=torch.bool, device=allowed.device)
    full[:, :n, :n] = torch.ones(n, n, dtype=torch.bool, device=allowed.device).tril()
    full[:, n:, :n] = True
    full[:, n:, n:] = allowed
    ahead = torch.arange(n, device=positions.device).expand(rows, n)
    output = decoder_of(model)(
        inputs_embeds=torch.cat([root.expand(rows, *root.shape), embeddings], 1),
        attention_mask=_additive(full, model.dtype),
        position_ids=torch.cat([ahead, positions], 1),
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state
    return states


def _root_pass(model: PreTrainedModel, root: Tensor) -> tuple[Tensor, DynamicCache]:
    """The root once at batch 1, with gradient: states (1, n, D), and keys and values for rows to stand behind."""
    n = len(root)
    causal = torch.ones(1, n, n, dtype=torch.bool, device=root.device).tril()
    cache, behind = DynamicCache(), DynamicCache()
    states = decoder_of(model)(
        inputs_embeds=root[None],
        attention_mask=_additive(causal, model.dtype),
        position_ids=torch.arange(n, device=root.device)[None],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    behind.layers = [_OverRoot(layer.keys, layer.values) for layer in cache.layers]
    return states, behind


def _rows_pass(
    model: PreTrainedModel, behind: DynamicCache, embeddings: Tensor, positions: Tensor, allowed: Tensor
) -> Tensor:
    """The rows' states (R, T, D) behind a root."""
    seen = torch.cat([allowed.new_ones(*allowed.shape[:2], behind.get_seq_length()), allowed], 2)
    output = decoder_of(model)(
        inputs_embeds=embeddings,
        attention_mask=_additive(seen, model.dtype),
        position_ids=positions,
        past_key_values=behind,
        use_cache=True,
    )
    states: Tensor = output.last_hidden_state
    return states


class _OverRoot(DynamicLayer):
    """What a row attends to: the root's keys and values (1, heads, n, d), then its own, which are not kept."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        rows = len(key_states)  # a view for each: autograd sums the rows' gradients
        keys = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], 2)
        return keys, torch.cat([self.values.expand(rows, -1, -1, -1), value_states], 2)


@contextmanager
def _other_forwards(model: PreTrainedModel, recompute: bool, compiled: bool) -> Iterator[None]:
    """Layers that keep their inputs alone and run again in the backward pass, or that torch.compile has made.

    The first not by transformers' own switch, which takes a layer's cache away and works on models in training mode
    only.
    """
    if not (recompute or compiled):
        yield
        return
    layers = layers_of(model)
    if not layers:
        key, what = ("recompute", "computed again") if recompute else ("compile", "compiled")
        raise PolicyPatchError(
            f"trainer.{key}: {type(model).__name__} has no layers that can be {what}: set it to false"
        )
    for layer in layers:
        forward = _compiled(layer) if compiled else layer.forward
        layer.forward = partial(checkpoint, forward, use_reentrant=False) if recompute else forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _compiled(layer: nn.Module) -> Any:
    """A layer's forward by torch.compile, for whatever length comes; made once."""
    if COMPILED not in layer.__dict__:
        layer.__dict__[COMPILED] = torch.compile(layer.forward, dynamic=True)
    return layer.__dict__[COMPILED]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, Q, K) bool -> (R, 1, Q, K) in the model's dtype, as every attention implementation takes it."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
