"""What stands in front of a model's own keys and values, and the attention that sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from policypatch.errors import PolicyPatchError
from policypatch.model.attention import attention_of
from policypatch.model.behind import Front, whole_of
from policypatch.patch.manifest import BaseIdentity

STATE = "_policypatch"  # where the modules of a model have it, and a cache what its tokens were read behind
NOTHING = (None,)  # what the tokens of the plain base were read behind


@dataclass(frozen=True)
class Stack:
    """Keys and values of vectors (L, D), layer by layer: (1, heads, L, d) each.

    Attributes:
        vectors: what they were computed from.
        layers: keys and values.
        digest: of the vectors.
        place: device and type of the model that computed them.
    """

    vectors: Tensor
    layers: Sequence[tuple[Tensor, Tensor]]
    digest: str
    place: tuple[torch.device, torch.dtype]

    @property
    def length(self) -> int:
        """Columns that it takes."""
        return len(self.vectors)


@dataclass(frozen=True)
class Bound:
    """What a model was recognised by when patches were applied (that takes a while), and what may differ.

    Attributes:
        identity: of the model.
        allow_mismatch: names of digests.
        key: public key that patches must be signed with; None where they need not be.
        looked_at: digests of the patches whose vectors were compared with its embeddings.
    """

    identity: BaseIdentity
    allow_mismatch: frozenset[str]
    key: Path | str | None = None
    looked_at: set[str] = field(default_factory=set)


@dataclass
class Applied:
    """What stands before a model's input now.

    Positions and masks are of the one forward that is under way. They are no thread's own, as layers that are computed
    again for gradients may be so in another thread: with a sliding window, one forward at a time.

    Attributes:
        kind: the attention implementation that the model had.
        rows: one stack for all rows of a batch, or one for each; None is the plain base.
        known: stacks that were computed, by digest, device and type.
        hooks: what shifts positions and stamps caches.
        shared: keys and values for a layer and a batch size, made once while the rows stay the same.
        window: how far back the model's sliding layers look.
        bound: what patches that come later must have been made for.
        positions: (B or 1, T) of the tokens that are being read, where that may be further on than the window.
        masks: of the forward that is under way, made once for all layers: the model's own, what it was made for, and
            itself, by the window and the device.
        inner: the model's own attention, by the class of a layer's.
    """

    kind: str
    rows: list[Stack | None] = field(default_factory=lambda: [None])
    known: dict[tuple[object, ...], Stack] = field(default_factory=dict)
    hooks: Sequence[Any] = ()
    shared: dict[tuple[int, int], Front] = field(default_factory=dict)
    window: int | None = None
    bound: Bound | None = None
    positions: Tensor | None = None
    masks: dict[tuple[object, ...], tuple[Tensor | None, tuple[int, ...], Tensor | None]] = field(default_factory=dict)
    inner: dict[type, Any] = field(default_factory=dict)

    def goes_on(self, cache: Any) -> None:
        """Refuse a cache whose tokens were read behind other stacks: they know those, and stand at their positions."""
        # One without a stamp that holds tokens was filled before patches were applied.
        before, now = cache.__dict__.get(STATE, NOTHING), self._digests()
        if before != now and cache.get_seq_length():
            raise PolicyPatchError(
                "past_key_values was filled behind another stack of patches, or none: go on with that, or begin anew"
            )
        cache.__dict__[STATE] = now

    def stamp(self, cache: Any) -> None:
        """Remember what the tokens of a cache that the model has made itself were read behind."""
        if STATE not in cache.__dict__:  # any other went through goes_on
            cache.__dict__[STATE] = self._digests()

    def _digests(self) -> tuple[str | None, ...]:
        found = tuple(None if stack is None else stack.digest for stack in self.rows)
        return found[:1] if len(set(found)) == 1 else found

    def become(self, rows: list[Stack | None]) -> None:
        """Have these stand in front."""
        self.rows = rows
        self.shared.clear()

    @contextmanager
    def standing(self, rows: list[Stack | None]) -> Iterator[None]:
        """The same for as long as the block lasts."""
        before = self.rows
        self.become(rows)
        try:
            yield
        finally:
            self.become(before)

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

    def front(self, number: int, batch: int) -> Front | None:
        """What stands before a layer's own keys and values; None where no stack stands before any row."""
        found = self.shared.get((number, batch))
        if found is None and self.longest:
            found = self.shared[number, batch] = self._front(number, batch)
        return found

    def _front(self, number: int, batch: int) -> Front:
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


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, over the stack's keys and values and then its own."""
    state: Applied = module.__dict__[STATE]
    inner = state.inner.get(type(module))
    if inner is None:
        inner = state.inner[type(module)] = attention_of(type(module), state.kind)
    whole = whole_of(key, value)
    batch, _, new, _ = query.shape
    if new == 1 and attention_mask is None and whole is not None and len(state.rows) == 1 and state.positions is None:
        return inner(module, query, *whole, None, **kwargs)  # a token of an answer, as nearly all are: all is seen
    front = state.front(int(module.layer_idx), batch)  # type: ignore[arg-type]
    if front is None:
        return inner(module, query, key, value, attention_mask, **kwargs)
    if whole is None:
        whole = torch.cat([front[0], key], 2), torch.cat([front[1], value], 2)
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    return inner(module, query, *whole, _mask(state, attention_mask, front[2], window, query, key.shape[2]), **kwargs)


def _mask(
    state: Applied, mask: Tensor | None, there: Tensor | None, window: int | None, query: Tensor, old: int
) -> Tensor | None:
    """The model's mask for `old` keys, widened by the stack's columns."""
    window = None if state.positions is None else window
    wanted, known = (query.shape[0], query.shape[2], old), state.masks.get((window, query.device))
    if known is not None and known[0] is mask and known[1] == wanted:
        return known[2]
    seen = None if there is None else there[:, None, None]  # (B, 1, 1, L)
    if window is not None and state.positions is not None:
        positions = state.positions.to(query.device)
        near = positions[:, None, :, None] - torch.arange(state.longest, device=query.device) < window
        seen = near if seen is None else seen & near
    made = _widened(mask, seen, state.longest, query.shape[2], old, query)
    state.masks[window, query.device] = mask, wanted, made
    return made


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
