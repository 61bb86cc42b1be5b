"""The figures of a batch, and what the shares of several ranks come to together.

Each is a mean over the rows that it concerns, and the loss is their weighted sum. A batch that is split unevenly, or so
that a share has no row of some kind, therefore has the loss and the gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from policypatch import ranks

LOSS = "loss"


class Figure(NamedTuple):
    """A figure of a batch, a mean over `rows` rows; `weight` is what it has in the loss."""

    value: Tensor
    rows: int
    weight: float = 0.0


def with_loss(figures: Mapping[str, Figure], rows: int) -> dict[str, Figure]:
    """The figures of a batch of so many rows, and before them their weighted sum."""
    loss = torch.stack([figure.weight * figure.value for figure in figures.values()]).sum()
    return {LOSS: Figure(loss, rows), **figures}


def whole(shares: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """The figures of a batch from those of its shares, without gradient.

    Args:
        shares: of each rank; one may lack a figure that has no row in it.
    """
    names = dict.fromkeys(name for share in shares for name in share if name != LOSS)
    rows = {name: sum(share[name].rows for share in shares if name in share) for name in names}
    found: dict[str, Figure] = {}
    for name in names:
        having = [share[name] for share in shares if name in share and share[name].rows]
        value = torch.stack([f.value.detach() * (f.rows / rows[name]) for f in having]).sum()
        found[name] = Figure(value, rows[name], having[0].weight)
    return with_loss(found, sum(share[LOSS].rows for share in shares))


def share_of_loss(ours: Mapping[str, Figure], of: Mapping[str, Figure], shares: int) -> Tensor:
    """What a rank derives: the mean of all ranks' gradients of it is the gradient of the whole batch's loss.

    Args:
        ours: the figures of this rank's share.
        of: those of the whole batch.
        shares: how many there are.
    """
    if shares == 1:
        return ours[LOSS].value
    parts = [f.value * (f.weight * f.rows * shares / of[name].rows) for name, f in ours.items() if name != LOSS]
    return torch.stack(parts).sum()


def over_ranks(ours: Mapping[str, Figure], counts: bool) -> tuple[Mapping[str, Figure], Mapping[str, Figure]]:
    """The figures of this rank's share and those of the whole batch.

    Args:
        ours: what this rank has computed.
        counts: false where its rows are another rank's, so that they must not count twice.
    """
    if ranks.size() == 1:
        return ours, ours
    if not counts:
        ours = {name: figure._replace(rows=0) for name, figure in ours.items()}
    told = {name: figure._replace(value=figure.value.detach().cpu()) for name, figure in ours.items()}
    return ours, whole(ranks.gather(told))
