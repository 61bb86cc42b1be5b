"""Log-probabilities of completions under a fixed policy (DPO's reference), computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from policypatch.files.arrays import rows_array
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.tree import Item
from policypatch.patch.artifact import digest

AT_ONCE = 16  # pairs in a tree


def item_logprobs(base: Base, patch: Tensor | None, items: Sequence[Item], row_tokens: int) -> Tensor:
    """Summed log-probabilities of chosen and rejected under the base behind `patch`: (rows, 2) float32.

    NaN where a row has no rejected completion.

    Args:
        base: the frozen base.
        patch: (P, D) the policy's vectors, None for the base itself.
        items: the rows as token ids, each with one completion or two.
        row_tokens: see `build_tree`.
    """
    patch = base.embedding[:0].float() if patch is None else patch
    ids = hashlib.sha256(repr([(i.prompt, i.completions) for i in items]).encode()).hexdigest()
    about = {
        "base": asdict(base.identity),
        "dtype": str(base.model.dtype),
        "patch": digest(patch.float().cpu()),
        "items": ids,
    }

    @torch.no_grad()
    def make(batches: Sequence[range]) -> Iterator[np.ndarray]:
        backbone = PrefixBackbone(base.model, patch, row_tokens)
        for rows in batches:
            batch = list(items[rows.start : rows.stop])
            out = np.full((len(batch), 2), np.nan, dtype=np.float32)
            sums = iter(backbone.sequence_logprobs(backbone.tree(batch)).tolist() if batch else ())
            for row, item in enumerate(batch):
                for column in range(len(item.completions)):
                    out[row, column] = next(sums)
            yield out

    return torch.from_numpy(rows_array("reference", about, len(items), make, "log-probabilities", AT_ONCE))
