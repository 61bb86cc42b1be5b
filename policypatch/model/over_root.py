"""Attention of rows over one root in a single pass: the root sees itself, each row sees the root and its own tokens.

Everything else in a layer works token by token, so that root and rows stand end to end in one sequence there, and the
layer's weights are read once. Attention alone takes them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policypatch.model.attention import KINDS, attention_of, register

APART = "_policypatch_apart"  # a model's attribute
PREFIX = "policypatch-over-root-"  # before the name of the attention that does the work


def can_stand_over_root(model: PreTrainedModel) -> bool:
    """Whether the model's attention is one that may be exchanged."""
    known = bool(getattr(model, "_supports_attention_backend", False)) and _kind(model) in KINDS
    return known and APART not in model.__dict__


def keep_apart(model: PreTrainedModel) -> None:
    """Never exchange this model's attention: it does more with a mask than to hand it on."""
    model.__dict__[APART] = True


@contextmanager
def over_root(model: PreTrainedModel) -> Iterator[None]:
    """For as long as the block lasts the model reads one sequence (1, n + R T) of a root and R rows of T tokens.

    Its attention mask is the rows' own, (R, 1, T, n + T), and says by its shape what n, R and T are.
    """
    kind, before = _kind(model), model.config._attn_implementation
    register(PREFIX + kind, attend, kind)
    model.config._attn_implementation = PREFIX + kind
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _kind(model: PreTrainedModel) -> str:
    """The attention that does the work."""
    return str(model.config._attn_implementation).removeprefix(PREFIX)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """The model's own attention, over the root and over each row.

    Args:
        module: the layer's attention.
        query, key, value: (1, heads, n + R T, d).
        attention_mask: (R, 1, T, n + T), added; a root's tokens see those before them.
        kwargs: as the model's own attention takes them.

    Returns:
        (1, n + R T, heads, d), and None.
    """
    rows, _, width, seen = attention_mask.shape
    n = seen - width
    config: Any = module.config
    inner = attention_of(type(module), config._attn_implementation.removeprefix(PREFIX))
    dtype = query.dtype
    if query.device.type == "cpu":
        # In half precision the backward pass of torch's attention takes up to three times as long on a CPU.
        query, key, value, attention_mask = (t.float() for t in (query, key, value, attention_mask))

    def apart(states: Tensor) -> tuple[Tensor, Tensor]:
        root, own = states.split([n, rows * width], 2)
        return root, own.squeeze(0).unflatten(1, (rows, width)).transpose(0, 1)

    (first, queries), (root_keys, keys), (root_values, values) = apart(query), apart(key), apart(value)
    causal = attention_mask.new_full((1, 1, n, n), torch.finfo(attention_mask.dtype).min).triu(1)
    of_root, _ = inner(module, first, root_keys, root_values, causal, **kwargs)
    keys = torch.cat([root_keys.expand(rows, -1, -1, -1), keys], 2)
    values = torch.cat([root_values.expand(rows, -1, -1, -1), values], 2)
    of_rows, _ = inner(module, queries, keys, values, attention_mask, **kwargs)
    return torch.cat([of_root, of_rows.flatten(0, 1)[None]], 1).to(dtype), None
