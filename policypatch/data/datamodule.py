"""The LightningDataModule: pairs as token trees, in an order that an interrupted run takes up where it left off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from policypatch.data.pairs import Pair, Text
from policypatch.errors import PolicyPatchError
from policypatch.model.tree import Item, Tree

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Batch:
    """What a step gets: the tree of its pairs, and for DPO the reference's log-probabilities (B, 2)."""

    pairs: tuple[int, ...]
    tree: Tree
    reference: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved = None if self.reference is None else self.reference.to(device)
        return replace(self, tree=self.tree.to(device), reference=moved)


def encode_pair(
    pair: Pair,
    encode_prompt: Encode,
    encode: Encode,
    eos: int | None,
    max_prompt_tokens: int,
    max_completion_tokens: int,
) -> Item:
    """A pair as token ids. The end of a prompt and the beginning of a completion are what is kept when cut.

    Args:
        pair: the texts.
        encode_prompt: tokenises what a sequence begins with (`Base.encode_prompt`).
        encode: tokenises what follows (`Base.encode`).
        eos: appended to a completion that ended itself; None where the base has no such token.
        max_prompt_tokens: limit of the prompt.
        max_completion_tokens: limit of each completion.
    """
    prompt = encode_prompt(pair.prompt)[-max_prompt_tokens:]
    return Item(
        tuple(prompt),
        tuple(_encode_text(side, encode, eos, max_completion_tokens) for side in (pair.chosen, pair.rejected)),
    )


def _encode_text(side: Text, encode: Encode, eos: int | None, limit: int) -> tuple[int, ...]:
    tokens = list(side.tokens) if side.tokens is not None else encode(side.text)
    if side.ended and eos is not None and len(tokens) < limit:
        tokens.append(eos)
    return tuple(tokens[:limit])


class PairData(L.LightningDataModule):
    """Batches of pairs for one stage.

    Args:
        items: one for each pair, with completions (chosen, rejected).
        batch_size: pairs an optimiser step (one process, no accumulation).
        steps: optimiser steps of the stage.
        seed: fixes the order.
        completions: 1 for SFT (chosen only), 2 for DPO.
        build: packs items into a tree (the backbone's `tree`).
        reference: (pairs, 2) log-probabilities under the reference, or None.
        held_out: share of the prompts whose pairs are kept for the validation figures; at least one when > 0.
    """

    def __init__(
        self,
        items: Sequence[Item],
        batch_size: int,
        steps: int,
        seed: int,
        completions: int,
        build: Callable[[list[Item]], Tree],
        reference: Tensor | None = None,
        held_out: float = 0.0,
    ):
        super().__init__()
        if not items:
            raise PolicyPatchError("there are no pairs to train on: loosen teacher.filter or give more prompts")
        self.items, self.batch_size, self.steps, self.seed = list(items), batch_size, steps, seed
        self.completions, self.build, self.reference = completions, build, reference
        self.training, self.validation = _split(self.items, held_out, seed)

    def batch(self, pairs: Sequence[int]) -> Batch:
        """The batch of these pair numbers."""
        items = [Item(self.items[i].prompt, self.items[i].completions[: self.completions]) for i in pairs]
        reference = None if self.reference is None else self.reference[list(pairs)]
        return Batch(tuple(pairs), self.build(items), reference)

    def train_dataloader(self) -> DataLoader:
        """The whole schedule, read from the trainer's current step on: a resumed run sees what was still to come."""
        schedule = _schedule(self.training, self.batch_size, self.steps, self.seed)
        return DataLoader(_Batches(self, schedule), batch_size=None, sampler=_Rest(self))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The held-out pairs in order; none when nothing is held out."""
        if not self.validation:
            return []
        groups = [self.validation[i : i + self.batch_size] for i in range(0, len(self.validation), self.batch_size)]
        return DataLoader(_Batches(self, groups), batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; Lightning does not know our type."""
        return batch.to(device)


def _split(items: Sequence[Item], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the pairs to train on and of those held out, split by prompt: a prompt's pairs resemble each other."""
    prompts = list(dict.fromkeys(item.prompt for item in items))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(prompts) - 1, max(1, round(held_out * len(prompts)))) if held_out > 0 else 0
    kept_back = {prompts[i] for i in order[:count]}
    numbers = range(len(items))
    training = [i for i in numbers if items[i].prompt not in kept_back]
    return training, [i for i in numbers if items[i].prompt in kept_back]


class _Batches(Dataset[Batch]):
    def __init__(self, data: PairData, groups: list[list[int]]):
        self.data, self.groups = data, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Batch:
        return self.data.batch(self.groups[index])


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


def _schedule(members: Sequence[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Pair numbers of every step: shuffled passes over the pairs, one after another."""
    stream = _passes(members, seed)
    return [[next(stream) for _ in range(batch_size)] for _ in range(steps)]


def _passes(members: Sequence[int], seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(members), generator=generator).tolist():
            yield members[i]
