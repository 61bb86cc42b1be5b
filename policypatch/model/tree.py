"""A batch as a tree: patch -> common prefix -> prompt -> completions, every node computed once.

Rows that share a beginning share its keys and values, because attention is causal. So the tokens of a batch are
laid out end to end ("packed"), each with the position it would have in its own sequence, and an attention mask lets
a token see its ancestors in the tree and nothing else. For B pairs this is `P + C + sum(Lp) + sum(Lc + Lr)` tokens
where concatenation costs `2B (P + Lp + Lc)`; the numbers that come out are the same.

Attention cost grows with the square of a packed row, so a batch becomes several rows, which all read the keys and
values of one shared root (patch + common prefix). How many is whatever costs least: rows that do not come out even are
padded.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TRIED = 16  # numbers of rows that are tried at most, about


@dataclass(frozen=True)
class Item:
    """One prompt and the completions that follow it, as token ids."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Tree:
    """A packed batch of `R` rows of `T` tokens over a shared root of `C` tokens (and a patch before them).

    Attributes:
        root: (C,) token ids of the longest common prefix of the prompts; may be empty.
        ids: (R, T) token ids, 0 where a row is padded.
        offsets: (R, T) each token's distance from the end of the root (its position is P + C + offset).
        allowed: (R, T, T) bool, True where the row's token may attend to the column's token of the same row.
        source_row, source_col: (N,) where the hidden state stands that predicts each completion token;
            column -1 means the root's last hidden state.
        targets: (N,) the completion tokens, in the order of the items and their completions.
        sequence: (N,) which completion each target belongs to, 0..S-1.
        sequences: S, the number of completions.
        padding: how many of the rows' tokens are none.
    """

    root: Tensor
    ids: Tensor
    offsets: Tensor
    allowed: Tensor
    source_row: Tensor
    source_col: Tensor
    targets: Tensor
    sequence: Tensor
    sequences: int
    padding: int

    def to(self, device: torch.device) -> Tree:
        """The same tree with its tensors on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding among them, the patch left out."""
        return self.root.numel() + self.ids.numel()


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest token prefix that all prompts share."""
    if not prompts:
        return 0
    # In lexicographic order: what the extremes share, all share.
    first, last = min(map(list, prompts)), max(map(list, prompts))
    n = 0
    while n < min(len(first), len(last)) and first[n] == last[n]:
        n += 1
    return n


@dataclass(frozen=True)
class Cost:
    """What a packing costs, in tokens through the layers of a base: to choose one by, not to tell time.

    A token costs about 24 D^2 operations in a layer's matrix products and a query against a key 4 D, in kernels that
    reach about half their rate (measured: 0.55, float32 on a CPU): 3 D keys cost what a token does.

    Attributes:
        width: D, of the embeddings.
        front: P, vectors that stand before everything.
        shared: whether several rows read the root once, or each of them anew.
        split: what it costs to have more than one row.
    """

    width: int
    front: int = 0
    shared: bool = True
    split: int = 0

    def __call__(self, root: int, rows: int, longest: int) -> float:
        """Of `rows` rows of `longest` tokens behind `root` tokens that they share."""
        n, keys_a_token = self.front + root, 3 * self.width
        roots = 1 if self.shared else rows
        split = self.split if rows > 1 else 0
        return split + roots * n * (1 + n / keys_a_token) + rows * longest * (1 + (n + longest) / keys_a_token)


def build_tree(items: Sequence[Item], max_row_tokens: int = 512, cost: Cost | None = None) -> Tree:
    """Pack items into a tree.

    Args:
        items: prompts with one completion (SFT) or two (DPO: chosen, rejected); completions are not empty.
        max_row_tokens: rows are closed before they exceed this, or the longest item where that alone is longer.
        cost: makes as many rows as cost least; None makes the fewest.

    Raises:
        ValueError: no items, or an empty completion. (An empty prompt is fine behind a patch; the backbone, which
            knows whether there is one, refuses it otherwise.)
    """
    if not items:
        raise ValueError("a tree needs at least one item")
    if any(not c for item in items for c in item.completions):
        raise ValueError("a completion has no tokens")
    shared = common_prefix([item.prompt for item in items])
    sizes = [len(i.prompt) - shared + sum(map(len, i.completions)) for i in items]
    rows = _cheapest_rows(sizes, max_row_tokens, shared, cost)
    width = max(sum(sizes[i] for i in row) for row in rows)

    ids = torch.zeros(len(rows), width, dtype=torch.long)
    offsets = torch.zeros(len(rows), width, dtype=torch.long)
    # A padding token sees only itself: a softmax over nothing would be NaN.
    allowed = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    first_sequence = _running_sum([len(i.completions) for i in items])
    found: list[tuple[int, int, int, int]] = []  # sequence, row, column of the source, target
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            prompt = items[i].prompt[shared:]
            p = slice(at, at + len(prompt))
            _place(ids, offsets, allowed, r, p, prompt, 0, None)
            at = p.stop
            for c, completion in enumerate(items[i].completions):
                s = slice(at, at + len(completion))
                _place(ids, offsets, allowed, r, s, completion, len(prompt), p)
                at = s.stop
                before = p.stop - 1 if prompt else -1
                sources = [before, *range(s.start, s.stop - 1)]
                found += [
                    (first_sequence[i] + c, r, col, token) for col, token in zip(sources, completion, strict=True)
                ]
    found.sort(key=lambda f: f[0])  # stable: tokens of a completion stay in order
    sequence, source_row, source_col, targets = (torch.tensor(x) for x in zip(*found, strict=True))
    return Tree(
        root=torch.tensor(items[0].prompt[:shared], dtype=torch.long),
        ids=ids,
        offsets=offsets,
        allowed=allowed,
        source_row=source_row,
        source_col=source_col,
        targets=targets,
        sequence=sequence,
        sequences=sum(len(i.completions) for i in items),
        padding=ids.numel() - sum(sizes),
    )


def _place(
    ids: Tensor,
    offsets: Tensor,
    allowed: Tensor,
    row: int,
    span: slice,
    tokens: Sequence[int],
    offset: int,
    parent: slice | None,
) -> None:
    """Write one node of the tree: its tokens, their positions, and what they may attend to."""
    n = len(tokens)
    ids[row, span] = torch.tensor(tokens, dtype=torch.long)
    offsets[row, span] = torch.arange(offset, offset + n)
    allowed[row, span, span] = torch.ones(n, n, dtype=torch.bool).tril()
    if parent is not None:
        allowed[row, span, parent] = True


def _cheapest_rows(sizes: Sequence[int], limit: int, root: int, cost: Cost | None) -> list[list[int]]:
    """Items (by number) in rows of at most `limit` tokens."""
    limit = max(limit, *sizes)  # every row is padded to the longest anyway
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    fewest = max(1, -(-sum(sizes) // limit))
    step = 1 if cost is None else -(-len(sizes) // TRIED)  # this is done for every batch
    counts = [*range(fewest, len(sizes), step), len(sizes)]  # the last, a row for each, is within any limit
    fitting = ((rows, load) for rows, load in (_fill_rows(sizes, order, count) for count in counts) if load <= limit)
    if cost is None:
        return next(fitting)[0]
    return min(fitting, key=lambda found: cost(root, len(found[0]), found[1]))[0]


def _fill_rows(sizes: Sequence[int], order: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """Items in `count` rows, longest first (`order`), each into the emptiest row; and how full the fullest is."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]  # a heap
    for i in order:
        load, row = loads[0]
        rows[row].append(i)
        heapq.heapreplace(loads, (load + sizes[i], row))
    return [sorted(row) for row in rows], max(loads)[0]


def _running_sum(counts: Sequence[int]) -> list[int]:
    total, out = 0, []
    for c in counts:
        out.append(total)
        total += c
    return out
