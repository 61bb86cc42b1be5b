"""A small patch with every field of its manifest filled in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from policypatch.patch.artifact import Patch, digest
from policypatch.patch.manifest import BaseIdentity, Manifest, Parent

BASE = BaseIdentity("tiny", "local", *(c * 64 for c in "12345"))


@pytest.fixture
def identity() -> BaseIdentity:
    return BASE


@pytest.fixture
def make_patch() -> Callable[..., Patch]:
    """make_patch(vectors, key=value...) -> a patch whose manifest fits the vectors, with these fields changed."""

    def make(vectors: torch.Tensor | None = None, **changes: Any) -> Patch:
        if vectors is None:
            vectors = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 0.1
        row = {"arm": "patch", "risk": "toxicity", "split": "test", "metric": "amt", "judge": "svm", "value": 0.25}
        row |= {"low": 0.125, "high": 0.375, "n": 100, "filter": False}
        fields: dict[str, Any] = {
            "name": "toxicity-tiny",
            "version": "1.2.0",
            "risks": ["toxicity"],
            "length": vectors.shape[0],
            "width": vectors.shape[1],
            "base": BASE,
            "sha256": digest(vectors),
            "created": "2026-11-23T08:00:00+00:00",
            "data_sha256": "d" * 64,
            "parents": [Parent("older", "1.1.0", "e" * 64)],
            "training": {"dpo": {"beta": 0.1, "betas": [0.9, 0.95], "enabled": True}, "seed": None},
            "scorecard": [row, row | {"judge": "lstm", "filter": True}, row | {"arm": "base", "judge": None}],
            "packages": {"policypatch": "0.1.0", "torch": "2.13.0"},
        }
        return Patch(vectors, Manifest(**(fields | changes)))

    return make
