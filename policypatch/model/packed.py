"""A packed tree through the layers of a frozen LM: rows of tokens over one root that all of them see.

Nothing that a layer is given over the rows changes while it runs, so that its activations may be computed again in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from policypatch.errors import PolicyPatchError
from policypatch.model.parts import decoder_of, layers_of


def packed_states(
    model: PreTrainedModel, root: Tensor, embeddings: Tensor, positions: Tensor, allowed: Tensor, recompute: bool
) -> Tensor:
    """Last hidden states (R, n + T, D) of a root and R rows over it.

    Args:
        model: the frozen LM.
        root: (n, D) input embeddings at positions 0..n-1, which every row sees; n may be 0.
        embeddings: (R, T, D) of the rows' tokens.
        positions: (R, T) of these.
        allowed: (R, T, T) bool, what a token sees of its own row.
        recompute: the rows' activations are computed again in the backward pass rather than kept.

    Raises:
        PolicyPatchError: `recompute`, and the model's layers are not ones that transformers recomputes.
    """
    over_rows = _recomputed(model) if recompute and torch.is_grad_enabled() else nullcontext()
    if len(allowed) == 1 or len(root) == 0:
        with over_rows:
            return _one_pass(model, root, embeddings, positions, allowed)
    first, behind = _root_pass(model, root)
    with over_rows:
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
def _recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Layers keep their inputs alone and run again in the backward pass.

    Not by transformers' own switch, which takes a layer's cache away and works on models in training mode only.
    """
    layers = layers_of(model)
    if not layers:
        raise PolicyPatchError(
            f"trainer.recompute: {type(model).__name__} has no layers that can be computed again: set it to false"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, Q, K) bool -> (R, 1, Q, K) in the model's dtype, as every attention implementation takes it."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
