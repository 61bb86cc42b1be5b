"""Patches on a customer's own transformers model: `generate`, pipelines, chats, any cache, with the patch in front.

    model = apply(model, tox, bias)      # a stack, in this order
    with using(model, None): ...         # the plain base, for a while
    remove(model)

The stack's keys and values are computed once. Every attention layer then sees them before its own, and positions are
counted on from the stack's length. Nothing else learns of it: caches, masks and token counts are the model's own, so
whatever builds on them goes on working, and another stack needs no other cache layout.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from policypatch.errors import PolicyPatchError
from policypatch.model.attention import KINDS, register
from policypatch.model.backbone import difference, tolerance_of
from policypatch.model.behind import adopt
from policypatch.model.in_front import STATE, Applied, Bound, Stack, attend
from policypatch.model.parts import context_of, decoder_of, sliding_window

PREFIX = "policypatch_"  # of the attention implementations that see a stack
KNOWN = 64  # stacks that are kept once computed, the last ones used


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
    if known is not None and model.config._attn_implementation != PREFIX + known.kind:
        changed = model.config._attn_implementation
        remove(model)
        model.config._attn_implementation, known = changed, None
    try:
        if known is None:
            _install(model)
        select(model, [list(vectors)])
        if known is None:
            _check(model, torch.cat([v.to(model.device) for v in vectors]))
    except BaseException:  # too little memory or Ctrl-C as well: half of it would count as applied and checked
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
        for hook in state.hooks:
            hook.remove()
        state.become([None])  # for the layers of caches that stood behind it
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
    with state.standing([_stack(model, state, row) for row in rows]):
        yield model


def state_of(model: PreTrainedModel) -> Applied | None:
    """What was applied to a model."""
    return model.__dict__.get(STATE)


def select(model: PreTrainedModel, rows: Sequence[Sequence[Tensor] | None]) -> None:
    """Have these stacks stand before the input: one for all rows, or one for each."""
    state = state_of(model)
    assert state is not None
    state.become([_stack(model, state, row) for row in rows])


def _install(model: PreTrainedModel) -> None:
    kind = model.config._attn_implementation
    if kind not in KINDS:
        raise PolicyPatchError(
            f"a patch is applied to attention of {' or '.join(KINDS)}, not {kind}: load the model so"
        )
    state = Applied(kind, window=sliding_window(model))
    for name in KINDS:
        register(PREFIX + name, attend, name)
    for module in model.modules():
        module.__dict__[STATE] = state  # neither parameter nor submodule, and in no state_dict
    model.config._attn_implementation = PREFIX + kind
    decoder = decoder_of(model)
    state.hooks = (
        decoder.register_forward_pre_hook(_shift, with_kwargs=True),
        decoder.register_forward_hook(_stamp, with_kwargs=True),
    )


def _stack(model: PreTrainedModel, state: Applied, patches: Sequence[Tensor] | None) -> Stack | None:
    return _computed(decoder_of(model), state, torch.cat([v.float().cpu() for v in patches])) if patches else None


@torch.no_grad()
def _computed(decoder: Any, state: Applied, vectors: Tensor) -> Stack:
    """Keys and values of vectors (L, D), once."""
    width = decoder.get_input_embeddings().weight.shape[1]
    if vectors.dim() != 2 or vectors.shape[1] != width:
        raise PolicyPatchError(
            f"the patch has shape {tuple(vectors.shape)} but this base takes vectors of width {width}"
        )
    context = context_of(decoder.config)
    if context is not None and len(vectors) >= context:
        raise PolicyPatchError(f"a stack of {len(vectors)} vectors leaves no room in the model's context of {context}")
    window = sliding_window(decoder)
    if window is not None and len(vectors) >= window:
        raise PolicyPatchError(f"a stack of {len(vectors)} vectors does not fit the model's sliding window of {window}")
    digest = hashlib.sha256(vectors.numpy().tobytes()).hexdigest()
    place = decoder.device, decoder.dtype
    stack = state.known.pop((digest, place), None)
    if stack is None:
        with state.standing([None]), _without_dropout(decoder):
            embedded = vectors.to(*place)[None]
            cache = decoder(inputs_embeds=embedded, past_key_values=DynamicCache(), use_cache=True).past_key_values
        stack = Stack(vectors, [(layer.keys, layer.values) for layer in cache.layers], digest, place)
    state.known[digest, place] = stack
    while len(state.known) > KNOWN:  # those that stand in front have other holders
        del state.known[next(iter(state.known))]
    return stack


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _stamp(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A cache that the model has made itself is known from now on, and stands behind the stack."""
    if (cache := getattr(output, "past_key_values", None)) is not None:
        state: Applied = module.__dict__[STATE]
        state.stamp(cache)
        if state.longest and kwargs.get("past_key_values") is None:  # one that was given stands behind it already
            adopt(cache, state.front, state.depth)


def _shift(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positions counted on from the stacks' lengths, and a cache that stands behind them."""
    state: Applied = module.__dict__[STATE]
    if module.config._attn_implementation != PREFIX + state.kind:
        raise PolicyPatchError(
            "the attention implementation was changed after a patch was applied, which has no effect so: apply it again"
        )
    past = kwargs.get("past_key_values")
    state.masks.clear()
    if past is not None:
        state.goes_on(past)
    if not state.longest:
        return args, kwargs
    place = module.device, module.dtype
    if any(stack is not None and stack.place != place for stack in state.rows):  # the model was moved since
        state.become([None if stack is None else _computed(module, state, stack.vectors) for stack in state.rows])
    given = kwargs.get("inputs_embeds")
    given = given if given is not None else kwargs.get("input_ids", args[0] if args else None)
    assert given is not None
    seen = 0 if past is None else past.get_seq_length()
    # A static cache counts in a tensor: read for every token, it would make an accelerator, or a compiler, wait.
    if isinstance(seen, int) or not (torch.compiler.is_compiling() or (seen.is_cuda and given.shape[1] == 1)):
        _check_room(context_of(module.config), state.longest, int(seen), given.shape[1])
    if past is not None:
        adopt(past, state.front, state.depth)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = _counted(kwargs.get("attention_mask"), given, seen)
    lengths = state.lengths(given.shape[0])
    shift = torch.tensor(lengths, device=positions.device)[:, None] if len(set(lengths)) > 1 else lengths[0]
    positions = positions + shift
    far = state.window is not None and int(positions.max()) >= state.window
    state.positions = positions if far else None
    return args, kwargs | {"position_ids": positions}


def _counted(mask: Any, given: Tensor, seen: int | Tensor) -> Tensor:
    """Positions (B or 1, T) of new tokens behind `seen` ones, where the caller gives none.

    Padding has no place between the stack and a prompt: with a mask (B, seen + T) the tokens that count are counted,
    as `generate` does. Masks of other ranks say nothing of padding.
    """
    places = torch.arange(given.shape[1], device=given.device) + seen
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return places[None]
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
    # By place, not from the end: the mask of a static cache may be as long as the cache.
    return counted.index_select(1, places.to(mask.device).clamp(max=mask.shape[1] - 1))


def _check_room(context: int | None, stack: int, before: int, new: int) -> None:
    """Refuse a prompt that passes the context, and tell once of an answer that does, as transformers would."""
    over = 0 if context is None else stack + before + new - context
    if over > 0 and (new > 1 or not before):
        tokens = f"{before} tokens and {new} more" if before else f"{new} tokens"
        raise PolicyPatchError(
            f"a stack of {stack} vectors and {tokens} exceed the model's context of {context}: "
            "shorten the prompt or the stack"
        )
    if over == 1:
        warnings.warn(
            f"the answer goes on beyond the model's context of {context}, {stack} vectors included", stacklevel=2
        )


def _check(model: PreTrainedModel, vectors: Tensor) -> None:
    """Refuse an architecture on which a stack does not do what vectors before the input do."""
    tokens = torch.tensor([[5, 6, 7, 8]], device=model.device)
    kind = type(model).__name__
    try:
        with torch.no_grad(), _without_dropout(model):
            ours = model(input_ids=tokens).logits[0].float()
            state = state_of(model)
            assert state is not None
            embedded = torch.cat([vectors.to(model.dtype), model.get_input_embeddings()(tokens)[0]])[None]
            with state.standing([None]):
                theirs = model(inputs_embeds=embedded).logits[0, len(vectors) :].float()
    except torch.OutOfMemoryError:  # says nothing of the architecture
        raise
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
