"""The LightningDataModule: pairs as token trees, in an order that an interrupted run takes up where it left off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from policypatch import ranks
from policypatch.data.pairs import IN_BATCH, Pair, Text
from policypatch.errors import PolicyPatchError
from policypatch.model.form import Form
from policypatch.model.tree import Item, Tree

PART_SEEDS = 1000  # apart are the seeds of the risks' orders
Encode = Callable[[str], list[int]]
EncodePrompt = Callable[[str, Form], list[int]]


@dataclass(frozen=True)
class Example:
    """A row as token ids, its kind (`policypatch.data.pairs.Pair`), and of several risks the number of its own."""

    item: Item
    kind: str = "pair"
    part: int = 0


@dataclass(frozen=True)
class Anchor:
    """The rows whose distance from the base counts.

    Attributes:
        tree: their prompts with the chosen completions alone.
        sequences: (K,) which of the batch's completions these are, ascending.
    """

    tree: Tree
    sequences: Tensor

    def to(self, device: torch.device) -> Anchor:
        """The same on `device`."""
        return Anchor(self.tree.to(device), self.sequences.to(device))


@dataclass(frozen=True)
class Batch:
    """What a step gets of B rows.

    Attributes:
        pairs: the rows' numbers, without those of `texts` and `balanced`.
        tree: their prompts and completions.
        chosen: (B,) which of the tree's completions is each row's chosen one.
        rejected: (B,) which is its rejected one, -1 where it has none.
        reference: for DPO (B, 2) log-probabilities under the reference.
        anchor: rows held to the base, None where there are none.
        texts: benign texts and their continuations, which are held to the base and have no other loss.
        balanced: prompts with two completions each that should be equally likely.
        counts: false on a rank for which a batch had no row left, so that it reads one of another's.
    """

    pairs: tuple[int, ...]
    tree: Tree
    chosen: Tensor
    rejected: Tensor
    reference: Tensor | None = None
    anchor: Anchor | None = None
    texts: Tree | None = None
    balanced: Tree | None = None
    counts: bool = True

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Tree | Anchor)
        }
        return replace(self, **moved)


def encode_pair(
    pair: Pair,
    encode_prompt: EncodePrompt,
    encode: Encode,
    eos: int | None,
    max_prompt_tokens: int,
    max_completion_tokens: int,
) -> Example:
    """A pair as token ids. The end of a text to continue and the beginning of a completion are what is kept when cut.

    Args:
        pair: the texts.
        encode_prompt: tokenises what a sequence begins with (`Base.encode_prompt`).
        encode: tokenises what follows (`Base.encode`).
        eos: appended to a completion that ended itself; None where the base has no such token.
        max_prompt_tokens: limit of the prompt.
        max_completion_tokens: limit of each completion.

    Raises:
        PolicyPatchError: a chat longer than the limit, which cannot be cut without tearing its template.
    """
    prompt = encode_prompt(pair.prompt, pair.form)
    if pair.chat and len(prompt) > max_prompt_tokens:
        raise PolicyPatchError(
            f"a request has {len(prompt)} tokens with its chat template, more than data.max_prompt_tokens "
            f"({max_prompt_tokens}), and a chat cannot be cut: raise it or drop the request {pair.prompt[:40]!r}..."
        )
    sides = [side for side in (pair.chosen, pair.rejected) if side is not None]
    completions = tuple(_encode_text(side, encode, eos, max_completion_tokens) for side in sides)
    return Example(Item(tuple(prompt[-max_prompt_tokens:]), completions), pair.kind)


def _encode_text(side: Text, encode: Encode, eos: int | None, limit: int) -> tuple[int, ...]:
    tokens = list(side.tokens) if side.tokens is not None else encode(side.text)
    if side.ended and eos is not None and len(tokens) < limit:
        tokens.append(eos)
    return tuple(tokens[:limit])


class PairData(L.LightningDataModule):
    """Batches of pairs for one stage. The pairs of several risks take turns, so that a batch has as many of each.

    Args:
        examples: one for each pair, with completions (chosen, rejected), or (chosen,) for a benign row without one.
        batch_size: rows an optimiser step, over all ranks.
        steps: optimiser steps of the stage.
        seed: fixes the order.
        completions: 1 for SFT (chosen only), 2 for DPO.
        build: packs items into a tree (the backbone's `tree`).
        reference: (pairs, 2) log-probabilities under the reference, or None.
        held_out: share of the prompts whose pairs are kept for the validation figures; at least one when > 0.
        benign_share: share of a batch's rows that are benign ones, where there are both; None takes them as they come.
        anchor: which rows carry the KL anchor: "benign", "all", or None for none.
        texts: benign texts a step, beside the batch's rows, where there are any.
        balanced: balanced rows a step, likewise.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        steps: int,
        seed: int,
        completions: int,
        build: Callable[[list[Item]], Tree],
        reference: Tensor | None = None,
        held_out: float = 0.0,
        benign_share: float | None = None,
        anchor: str | None = None,
        texts: int = 0,
        balanced: int = 0,
    ):
        super().__init__()
        if not examples:
            raise PolicyPatchError("there are no pairs to train on: loosen teacher.filter or give more prompts")
        self.examples, self.batch_size, self.steps, self.seed = list(examples), batch_size, steps, seed
        self.completions, self.build, self.reference = completions, build, reference
        self.benign_share, self.anchor = benign_share, anchor
        self.beside = {"text": texts, "balanced": balanced}
        self.training, self.validation = _split(self.examples, self.numbers(*IN_BATCH), held_out, seed)

    def numbers(self, *kinds: str) -> list[int]:
        """Numbers of the rows of these kinds."""
        return [i for i, example in enumerate(self.examples) if example.kind in kinds]

    def batch(self, pairs: Sequence[int], texts: Sequence[int] = (), balanced: Sequence[int] = ()) -> Batch:
        """The batch of these row numbers; of several ranks, this one's share of it."""
        texts, balanced = (_dealt(numbers) for numbers in (texts, balanced))
        counts, pairs = bool(_dealt(pairs)), _dealt(pairs) or pairs[:1]
        rows = [self.examples[i] for i in pairs]
        items = [Item(row.item.prompt, row.item.completions[: self.completions]) for row in rows]
        sides = torch.tensor([len(item.completions) for item in items])
        chosen = sides.cumsum(0) - sides
        rejected = torch.where(sides > 1, chosen + 1, -1)
        reference = None if self.reference is None else self.reference[list(pairs)]
        held = [
            b
            for b, row in enumerate(rows)
            if self.anchor == "all" or (self.anchor == "benign" and row.kind == "benign")
        ]
        anchor = None
        if held:
            alone = [Item(items[b].prompt, items[b].completions[:1]) for b in held]
            anchor = Anchor(self.build(alone), chosen[held])
        beside = {
            name: self.build([self.examples[i].item for i in numbers]) if numbers else None
            for name, numbers in (("texts", texts), ("balanced", balanced))
        }
        return Batch(tuple(pairs), self.build(items), chosen, rejected, reference, anchor, **beside, counts=counts)

    def train_dataloader(self) -> DataLoader:
        """The whole schedule, read from the trainer's current step on: a resumed run sees what was still to come."""
        benign = [i for i in self.training if self.examples[i].kind == "benign"]
        others = [i for i in self.training if self.examples[i].kind == "pair"]
        share = self.benign_share if benign and others else None
        if share is None:
            schedule = _schedule(self._by_part(self.training), self.batch_size, self.steps, self.seed)
        else:
            risky, harmless = self._by_part(others), self._by_part(benign)
            schedule = _mixed_schedule(risky, harmless, share, self.batch_size, self.steps, self.seed)
        beside = [self._beside(kind, count, self.seed + 2) for kind, count in self.beside.items()]
        groups = list(zip(schedule, *beside, strict=True))
        return DataLoader(_Batches(self, groups), batch_size=None, sampler=_Rest(self))

    def _beside(self, kind: str, count: int, seed: int) -> list[list[int]]:
        """Rows of a kind for every step, none where there are none."""
        members = self.numbers(kind)
        return _schedule([members], count if members else 0, self.steps, seed)

    def _by_part(self, numbers: Sequence[int]) -> list[list[int]]:
        """These rows by the risk that they are of, those that have any."""
        found: dict[int, list[int]] = {}
        for i in numbers:
            found.setdefault(self.examples[i].part, []).append(i)
        return [found[part] for part in sorted(found)]

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The held-out pairs in order; none when nothing is held out."""
        if not self.validation:
            return []
        starts = range(0, len(self.validation), self.batch_size)
        groups = [(self.validation[i : i + self.batch_size],) for i in starts]
        return DataLoader(_Batches(self, groups), batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; Lightning does not know our type."""
        return batch.to(device)


def _dealt(numbers: Sequence[int]) -> Sequence[int]:
    """This rank's share of a batch's rows. Dealt out one by one, for a batch has its benign rows at its end."""
    return numbers[ranks.rank() :: ranks.size()]


def _split(rows: Sequence[Example], numbers: Sequence[int], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Of these rows those to train on and those held out, split by prompt: a prompt's pairs resemble each other.

    As many of each risk, so that none is left without rows to train on.
    """
    kept_back = set()
    for part in {rows[i].part for i in numbers}:
        prompts = list(dict.fromkeys(rows[i].item.prompt for i in numbers if rows[i].part == part))
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        count = min(len(prompts) - 1, max(1, round(held_out * len(prompts)))) if held_out > 0 else 0
        kept_back |= {(part, prompts[i]) for i in order[:count]}
    training = [i for i in numbers if (rows[i].part, rows[i].item.prompt) not in kept_back]
    return training, [i for i in numbers if (rows[i].part, rows[i].item.prompt) in kept_back]


class _Batches(Dataset[Batch]):
    def __init__(self, data: PairData, groups: Sequence[tuple[list[int], ...]]):
        self.data, self.groups = data, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Batch:
        return self.data.batch(*self.groups[index])


class _Rest(Sampler[int]):
    """Batch numbers from the trainer's step to the end.

    Its length is that of the whole schedule: Lightning counts the batches of before the interruption as fetched, so a
    loader that is as short as the rest would end early and then start again from its own beginning.
    """

    def __init__(self, data: PairData):
        self.data = data

    def __len__(self) -> int:
        return self.data.steps

    def __iter__(self) -> Iterator[int]:
        done = self.data.trainer.global_step if self.data.trainer else 0
        return iter(range(done, self.data.steps))


def _schedule(members: Sequence[Sequence[int]], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Pair numbers of every step: shuffled passes over the pairs of each risk, which take turns."""
    stream = _passes(members, seed)
    return [[next(stream) for _ in range(batch_size)] for _ in range(steps)]


def _mixed_schedule(
    others: Sequence[Sequence[int]],
    benign: Sequence[Sequence[int]],
    share: float,
    batch_size: int,
    steps: int,
    seed: int,
) -> list[list[int]]:
    """The same with benign rows as that share of the rows seen so far, to the nearest row, at every step."""
    risky, harmless = _passes(others, seed), _passes(benign, seed + 1)
    seen = [round(share * batch_size * step) for step in range(steps + 1)]
    counts = [seen[step + 1] - seen[step] for step in range(steps)]
    return [
        [next(risky) for _ in range(batch_size - count)] + [next(harmless) for _ in range(count)] for count in counts
    ]


def _passes(members: Sequence[Sequence[int]], seed: int) -> Iterator[int]:
    """A row of each group in turn, every group in shuffled passes of its own."""
    streams = [_shuffled(group, seed + PART_SEEDS * i) for i, group in enumerate(members)]
    while True:
        for stream in streams:
            yield next(stream)


def _shuffled(members: Sequence[int], seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(members), generator=generator).tolist():
            yield members[i]
