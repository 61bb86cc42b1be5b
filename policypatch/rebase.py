"""A patch carried to another version of its base, or to another base: the map between two embedding matrices.

A patch lives in the space of its base's input embeddings. Tokens that both vocabularies have say where the same meaning
lies in either; a linear map fitted on them carries whatever else lies there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from policypatch.errors import PolicyPatchError
from policypatch.model.base import Base

RIDGE = 1e-4  # of the mean squared length: keeps the fit of directions that embeddings hardly use near 0


@dataclass(frozen=True)
class Carried:
    """Vectors in the new base's space, and how well the map that carried them fits.

    Attributes:
        vectors: (L, D') of the new base's width.
        shared: tokens that both vocabularies have.
        explained: share of the new embeddings' variance (of shared tokens left out of the fit) that the map explains.
    """

    vectors: Tensor
    shared: int
    explained: float


def shared_tokens(old: Base, new: Base) -> tuple[Tensor, Tensor]:
    """Ids (N,) in both vocabularies of the tokens that are written the same."""
    theirs = new.tokenizer.get_vocab()
    limits = [base.model.get_input_embeddings().weight.shape[0] for base in (old, new)]
    pairs = sorted(
        (number, theirs[token])
        for token, number in old.tokenizer.get_vocab().items()
        if token in theirs and number < limits[0] and theirs[token] < limits[1]
    )
    if not pairs:
        raise PolicyPatchError(f"{old.identity.id} and {new.identity.id} share no token: nothing says how to go over")
    first, second = zip(*pairs, strict=True)
    return torch.tensor(first), torch.tensor(second)


def fitted(old: Tensor, new: Tensor) -> Tensor:
    """(D, D') the matrix W that is nearest to old W = new, by ridge regression.

    Args:
        old: (N, D).
        new: (N, D').
    """
    old, new = old.double(), new.double()
    gram = old.T @ old
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, old.T @ new)


def carried(vectors: Tensor, old: Base, new: Base) -> Carried:
    """A patch's vectors (L, D) in the space of another base.

    Raises:
        PolicyPatchError: the vocabularies share no token.
    """
    ours, theirs = shared_tokens(old, new)
    before, after = old.embedding[ours].float().cpu(), new.embedding[theirs].float().cpu()
    told = torch.arange(len(ours)) % 10 == 9  # left out, so that a fit of few tokens to many numbers is seen through
    explained = float("nan")
    if told.any():
        guess = before[told].double() @ fitted(before[~told], after[~told])
        rest = after[told].double() - after[~told].double().mean(0)
        explained = 1 - ((guess - after[told].double()).pow(2).sum() / rest.pow(2).sum()).item()
    made = (vectors.double() @ fitted(before, after)).float()
    return Carried(made, len(ours), explained)
