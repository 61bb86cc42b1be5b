"""Patches on a customer's own transformers model: `generate`, pipelines, chats, any cache, with the patch in front.

    model = apply(model, tox, bias)      # a stack, in this order
    with using(model, None): ...         # the plain base, for a while
    remove(model)

The stack's keys and values are computed once. Every attention layer then sees them before its own, and positions are
counted on from the stack's length. Nothing else learns of it: caches, masks and token counts are the model's own, so
whatever builds on them goes on working, and another stack needs no other cache layout.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import difference, tolerance_of
from policypatch.model.behind import BehindLayer, adopt
from policypatch.model.parts import context_of, decoder_of, sliding_window
from policypatch.patch.manifest import BaseIdentity

PREFIX = "policypatch_"  # of the attention implementations that see a stack
KINDS = ("sdpa", "eager")
STATE = "_policypatch"


@dataclass(frozen=True)
class Stack:
    """Keys and values of vectors, layer by layer: (1, heads, L, d) each."""

    length: int
    layers: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Bound:
    """What a model was recognised by when patches were applied (that takes a while), and what may differ.

    Attributes:
        identity: of the model.
        allow_mismatch: names of digests.
        looked_at: digests of the patches whose vectors were compared with its embeddings.
    """

    identity: BaseIdentity
    allow_mismatch: frozenset[str]
    looked_at: set[str] = field(default_factory=set)


@dataclass
class Applied:
    """What stands before a model's input now.

    Attributes:
        kind: the attention implementation that the model had.
        rows: one stack for all rows of a batch, or one for each; None is the plain base.
        known: stacks that were computed, by their vectors.
        hook: what shifts positions.
        shared: keys and values for a layer and a batch size, made once while the rows stay the same.
        window: how far back the model's sliding layers look.
        bound: what patches that come later must have been made for.
        positions: (B or 1, T) of the tokens that are being read, where that may be further on than the window.
        cache: of the forward that is under way.
    """

    kind: str
    rows: list[Stack | None] = field(default_factory=lambda: [None])
    known: dict[bytes, Stack] = field(default_factory=dict)
    hook: Any = None
    shared: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)
    window: int | None = None
    bound: Bound | None = None
    positions: Tensor | None = None
    cache: weakref.ref[Any] | None = None

    @property
    def longest(self) -> int:
        """Columns that the stacks take."""
        return max((stack.length for stack in self.rows if stack is not None), default=0)

    @property
    def depth(self) -> int:
        """Layers of the model, where a stack stands before any row."""
        return next((len(stack.layers) for stack in self.rows if stack is not None), 0)

    def lengths(self, batch: int) -> list[int]:
        """Of each row of a batch, which may hold several beams of a row."""
        if batch % len(self.rows):
            raise PolicyPatchError(
                f"{len(self.rows)} stacks do not fit a batch of {batch}: give one, or one for each row"
            )
        return [0 if stack is None else stack.length for stack in self.rows for _ in range(batch // len(self.rows))]

    def layer(self, number: int, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, heads, L, d) for a layer, and (B, L) which of them a row has; None where all do."""
        if (number, batch) not in self.shared:
            self.shared[number, batch] = self._layer(number, batch)
        return self.shared[number, batch]

    def front(self, number: int, batch: int) -> tuple[Tensor, Tensor] | None:
        """The same without the mask; None where no stack stands before any row."""
        return self.layer(number, batch)[:2] if self.longest else None

    def _layer(self, number: int, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        lengths, most = self.lengths(batch), self.longest
        if len(self.rows) == 1:
            assert self.rows[0] is not None
            keys, values = self.rows[0].layers[number]
            return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), None
        example = next(stack for stack in self.rows if stack is not None).layers[number]
        both = [t.new_zeros(batch, t.shape[1], most, t.shape[3]) for t in example]
        each = batch // len(self.rows)
        for row, stack in enumerate(self.rows):
            if stack is not None:
                for whole, part in zip(both, stack.layers[number], strict=True):
                    whole[row * each : (row + 1) * each, :, : stack.length] = part
        there = torch.arange(most)[None] < torch.tensor(lengths)[:, None]
        return both[0], both[1], None if bool(there.all()) else there.to(both[0].device)


def apply(model: PreTrainedModel, *vectors: Tensor, bound: Bound | None = None) -> PreTrainedModel:
    """Put a stack of patches before everything that the model reads, until `remove`.

    Args:
        model: the base; it is changed in place, its weights are not.
        vectors: (L_i, D) of each patch, in the order in which they stand.
        bound: kept for `using`.

    Returns:
        the model.

    Raises:
        PolicyPatchError: an attention implementation other than sdpa or eager, an architecture on which the patched
            model does not compute what plain concatenation does, or vectors of another width.
    """
    if not vectors:
        raise PolicyPatchError("apply needs at least one patch")
    known = state_of(model)
    if known is None:
        _install(model)
    try:
        select(model, [list(vectors)])
        if known is None:
            _check(model, torch.cat([v.to(model.device) for v in vectors]))
    except PolicyPatchError:
        if known is None:
            remove(model)
        raise
    state = state_of(model)
    assert state is not None
    state.bound = bound
    return model


def remove(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it was before `apply`."""
    state = state_of(model)
    if state is not None:
        state.hook.remove()
        for module in model.modules():
            module.__dict__.pop(STATE, None)
        model.config._attn_implementation = state.kind
    return model


@contextmanager
def using(model: PreTrainedModel, *rows: Sequence[Tensor] | None) -> Iterator[PreTrainedModel]:
    """Other stacks for as long as the block lasts.

    Args:
        model: one that patches were applied to.
        rows: one stack (a list of vectors, or None for the plain base) for all rows, or one for each row of the batch.
    """
    state = state_of(model)
    if state is None:
        raise PolicyPatchError("no patch was applied to this model: call apply first")
    before = state.rows
    select(model, list(rows))
    try:
        yield model
    finally:
        state.rows = before
        state.shared.clear()


def state_of(model: PreTrainedModel) -> Applied | None:
    """What was applied to a model."""
    return model.__dict__.get(STATE)


def select(model: PreTrainedModel, rows: Sequence[Sequence[Tensor] | None]) -> None:
    """Have these stacks stand before the input: one for all rows, or one for each."""
    state = state_of(model)
    assert state is not None
    state.rows = [
        None if not stack else _computed(model, state, torch.cat([v.float().cpu() for v in stack])) for stack in rows
    ]
    state.shared.clear()


def _install(model: PreTrainedModel) -> None:
    kind = model.config._attn_implementation
    if kind not in KINDS:
        raise PolicyPatchError(
            f"a patch is applied to attention of {' or '.join(KINDS)}, not {kind}: load the model so"
        )
    state = Applied(kind, window=sliding_window(model))
    for name in KINDS:
        if PREFIX + name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, _attend)
            ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.config._attn_implementation = PREFIX + kind
    for module in model.modules():
        module.__dict__[STATE] = state  # neither parameter nor submodule, and in no state_dict
    state.hook = decoder_of(model).register_forward_pre_hook(_shift, with_kwargs=True)


@torch.no_grad()
def _computed(model: PreTrainedModel, state: Applied, vectors: Tensor) -> Stack:
    """Keys and values of vectors (L, D), once."""
    width = model.get_input_embeddings().weight.shape[1]
    if vectors.dim() != 2 or vectors.shape[1] != width:
        raise PolicyPatchError(
            f"the patch has shape {tuple(vectors.shape)} but this base takes vectors of width {width}"
        )
    context = context_of(model.config)
    if context is not None and len(vectors) >= context:
        raise PolicyPatchError(f"a stack of {len(vectors)} vectors leaves no room in the model's context of {context}")
    window = sliding_window(model)
    if window is not None and len(vectors) >= window:
        raise PolicyPatchError(f"a stack of {len(vectors)} vectors does not fit the model's sliding window of {window}")
    key = vectors.numpy().tobytes() + f"{model.device} {model.dtype}".encode()
    if key not in state.known:
        before, state.rows = state.rows, [None]
        try:
            embedded = vectors.to(model.device, model.dtype)[None]
            cache = decoder_of(model)(
                inputs_embeds=embedded, past_key_values=DynamicCache(), use_cache=True
            ).past_key_values
        finally:
            state.rows = before
        state.known[key] = Stack(len(vectors), [(layer.keys, layer.values) for layer in cache.layers])
    return state.known[key]


def _shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positions counted on from the stacks' lengths, and a cache that stands behind them."""
    state: Applied = module.__dict__[STATE]
    past = kwargs.get("past_key_values")
    state.cache = None if past is None else weakref.ref(past)
    if not state.longest:
        return args, kwargs
    given = kwargs.get("inputs_embeds")
    given = given if given is not None else kwargs.get("input_ids", args[0] if args else None)
    assert given is not None
    context = context_of(module.config)
    whole = past is None or (type(past) is DynamicCache and not past.get_seq_length())  # nothing was read before
    if whole and context is not None and state.longest + given.shape[1] > context:
        raise PolicyPatchError(
            f"a stack of {state.longest} vectors and {given.shape[1]} tokens exceed the model's context of {context}: "
            "shorten the prompt or the stack"
        )
    if past is not None:
        adopt(past, state.front, state.depth)
    positions = kwargs.get("position_ids")
    if positions is None:
        seen = 0 if past is None else past.get_seq_length()
        positions = (torch.arange(given.shape[1], device=given.device) + seen)[None]
    lengths = state.lengths(given.shape[0])
    shift = torch.tensor(lengths, device=positions.device)[:, None] if len(set(lengths)) > 1 else lengths[0]
    positions = positions + shift
    far = state.window is not None and int(positions.max()) >= state.window
    state.positions = positions if far else None
    return args, kwargs | {"position_ids": positions}


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, over the stack's keys and values and then its own."""
    state: Applied = module.__dict__[STATE]
    inner = ALL_ATTENTION_FUNCTIONS.get_interface(state.kind, _eager_of(module))
    number = int(module.layer_idx)  # type: ignore[arg-type]
    cache = None if state.cache is None else state.cache()
    layer = None if cache is None or number >= len(cache.layers) else cache.layers[number]
    whole = layer.whole(key, value) if isinstance(layer, BehindLayer) else None
    batch, _, new, _ = query.shape
    if new == 1 and attention_mask is None and whole is not None and len(state.rows) == 1 and state.positions is None:
        return inner(module, query, *whole, None, **kwargs)  # a token of an answer, as nearly all are: all is seen
    if not state.longest:
        return inner(module, query, key, value, attention_mask, **kwargs)
    keys, values, there = state.layer(number, batch)
    seen = None if there is None else there[:, None, None]  # (B, 1, 1, L)
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    if window is not None and state.positions is not None:
        near = state.positions[:, None, :, None] - torch.arange(state.longest, device=query.device) < window
        seen = near if seen is None else seen & near
    mask = _widened(attention_mask, seen, state.longest, new, key.shape[2], query)
    if whole is None:
        whole = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return inner(module, query, *whole, mask, **kwargs)


def _eager_of(module: nn.Module) -> Any:
    """The function that the module's own file has for eager attention."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _widened(mask: Tensor | None, seen: Tensor | None, length: int, new: int, old: int, query: Tensor) -> Tensor | None:
    """A mask (B or 1, 1, T, length + old) whose first columns are the stack's.

    Args:
        mask: the model's own, (B or 1, 1 or H, T, old): boolean or added; None is causal.
        seen: (B or 1, 1, T or 1, length) what of the stack is seen; None is all of it.
        length: columns of the stack.
        new: T.
        old: keys of the model's own tokens.
        query: for its device.
    """
    if mask is None:
        if new == 1 and seen is None:
            return None
        # None means causal, and where there is more than one new token nothing came before them.
        own = torch.ones(new, old, dtype=torch.bool, device=query.device)
        mask = (own.tril() if new > 1 else own)[None, None]
    front = torch.ones(1, 1, 1, length, dtype=torch.bool, device=mask.device) if seen is None else seen
    front = front.expand(-1, 1, mask.shape[2], -1)
    if mask.dtype != torch.bool:
        front = torch.where(front, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    rows = max(front.shape[0], mask.shape[0])
    return torch.cat([front.expand(rows, mask.shape[1], -1, -1), mask.expand(rows, -1, -1, -1)], -1)


def _check(model: PreTrainedModel, vectors: Tensor) -> None:
    """Refuse an architecture on which a stack does not do what vectors before the input do."""
    tokens = torch.tensor([[5, 6, 7, 8]], device=model.device)
    kind = type(model).__name__
    try:
        with torch.no_grad():
            ours = model(input_ids=tokens).logits[0].float()
            state = state_of(model)
            assert state is not None
            before, state.rows = state.rows, [None]
            embedded = torch.cat([vectors.to(model.dtype), model.get_input_embeddings()(tokens)[0]])[None]
            theirs = model(inputs_embeds=embedded).logits[0, len(vectors) :].float()
            state.rows = before
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise PolicyPatchError(
            f"{kind} is not supported: a patch cannot be put before its attention ({error})"
        ) from error
    off = difference(ours, theirs, model.dtype)
    if not off <= tolerance_of(model.dtype):
        raise PolicyPatchError(
            f"{kind} is not supported: with the patch applied its logits differ by {off:.1e} of their spread from "
            "those of plain concatenation"
        )
