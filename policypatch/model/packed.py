"""A packed tree through the layers of a frozen LM: rows of tokens over one root that all of them see.

Nothing that a layer is given changes while it runs, so that its activations may be computed again in the backward pass.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from policypatch.errors import PolicyPatchError
from policypatch.model.over_root import can_stand_over_root, over_root
from policypatch.model.parts import decoder_of, layers_of

COMPILED = "_policypatch_compiled"  # a layer's attribute


def can_compile(device: str) -> bool:
    """Whether layers can be compiled for a device: a `cpu` takes a C++ compiler, others none of ours."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    return device != "cpu" or any(compiler and shutil.which(compiler) for compiler in compilers)


def packed_states(
    model: PreTrainedModel,
    root: Tensor,
    embeddings: Tensor,
    positions: Tensor,
    allowed: Tensor,
    wanted: tuple[Tensor, Tensor],
    recompute: bool,
    compiled: bool = False,
) -> Tensor:
    """Last hidden states (N, D) of R rows over a root.

    Args:
        model: the frozen LM.
        root: (n, D) input embeddings at positions 0..n-1, which every row sees; n may be 0.
        embeddings: (R, T, D) of the rows' tokens.
        positions: (R, T) of these.
        allowed: (R, T, T) bool, what a token sees of its own row.
        wanted: (N,) rows and (N,) columns of the states that are asked for; column -1 is the root's last.
        recompute: activations are computed again in the backward pass rather than kept.
        compiled: layers run as torch.compile makes them.

    Raises:
        PolicyPatchError: one of the last two, and the model's layers are not known.
    """
    recompute, compiled = (asked and torch.is_grad_enabled() for asked in (recompute, compiled))
    one_on_gpu = len(allowed) == 1 and allowed.is_cuda  # which waits to be asked for every part
    shared = len(root) > 0 and not one_on_gpu and can_stand_over_root(model)
    attention = partial(over_root, model) if shared else nullcontext
    rows, width, n = *allowed.shape[:2], len(root)
    row, column = wanted
    ahead = torch.arange(n, device=positions.device)
    seen = torch.cat([allowed.new_ones(rows, width, n), allowed], 2)
    if shared:  # root and rows end to end
        inputs = torch.cat([root, embeddings.flatten(0, 1)])[None]
        places = torch.cat([ahead, positions.flatten()])[None]
        at = torch.zeros_like(row), n + torch.where(column < 0, -1, row * width + column)
    else:  # every row with a root of its own
        inputs = torch.cat([root.expand(rows, *root.shape), embeddings], 1)
        places = torch.cat([ahead.expand(rows, n), positions], 1)
        at = row, n + column
        seen = torch.cat([seen.new_ones(n, n + width).tril().expand(rows, -1, -1), seen], 1)
    with attention(), _other_forwards(model, attention, recompute, compiled):
        states: Tensor = decoder_of(model)(
            inputs_embeds=inputs,
            attention_mask=_additive(seen, model.dtype),
            position_ids=places,
            use_cache=False,
        ).last_hidden_state
    return states[at]


@contextmanager
def _other_forwards(
    model: PreTrainedModel, attention: Callable[[], AbstractContextManager[None]], recompute: bool, compiled: bool
) -> Iterator[None]:
    """Layers that keep their inputs alone and run again in the backward pass, or that torch.compile has made.

    The first not by transformers' own switch, which takes a layer's cache away and works on models in training mode
    only. `attention` is what stands around the model now, and must stand around a layer that runs again.
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
        if recompute:
            forward = partial(checkpoint, partial(_within, attention, forward), use_reentrant=False)
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _within(attention: Callable[[], AbstractContextManager[None]], forward: Any, *args: Any, **kwargs: Any) -> Any:
    with attention():
        return forward(*args, **kwargs)


def _compiled(layer: nn.Module) -> Any:
    """A layer's forward by torch.compile, for whatever length comes; made once."""
    if COMPILED not in layer.__dict__:
        layer.__dict__[COMPILED] = torch.compile(layer.forward, dynamic=True)
    return layer.__dict__[COMPILED]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, Q, K) bool -> (R, 1, Q, K) in the model's dtype, as every attention implementation takes it."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
