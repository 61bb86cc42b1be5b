"""DPO's reference: log-probabilities of every pair under a fixed policy, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from policypatch.files.cache import content_key, entry
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.tree import Item
from policypatch.patch.artifact import digest
from policypatch.progress import track

AT_ONCE = 16  # pairs in a tree


def reference_logprobs(base: Base, patch: Tensor, items: Sequence[Item], row_tokens: int) -> Tensor:
    """Summed log-probabilities of chosen and rejected under the base behind `patch`: (pairs, 2) float32.

    Args:
        base: the frozen base.
        patch: (P, D) the reference's vectors; P = 0 makes the base itself the reference.
        items: the pairs as token ids.
        row_tokens: see `build_tree`.
    """
    ids = hashlib.sha256(repr([(i.prompt, i.completions) for i in items]).encode()).hexdigest()
    about = {
        "base": asdict(base.identity),
        "dtype": str(base.model.dtype),
        "patch": digest(patch.float().cpu()),
        "items": ids,
    }

    @torch.no_grad()
    def build(folder: Path) -> None:
        backbone = PrefixBackbone(base.model, patch, row_tokens)
        rows = []
        with track("reference", len(items)) as advance:
            for start in range(0, len(items), AT_ONCE):
                batch = list(items[start : start + AT_ONCE])
                rows.append(backbone.sequence_logprobs(backbone.tree(batch)).reshape(-1, 2).cpu())
                advance(len(batch))
        np.save(folder / "logprobs.npy", torch.cat(rows).numpy())

    folder = entry("reference", content_key(**about), build, about=about)
    return torch.from_numpy(np.load(folder / "logprobs.npy", allow_pickle=False))
