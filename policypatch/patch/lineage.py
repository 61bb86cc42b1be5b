"""Patches that come from others: what such a one says of itself."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version as installed
from typing import Any

import torch

from policypatch.patch.artifact import Patch, digest


def derived(patch: Patch, vectors: torch.Tensor, **fields: Any) -> Patch:
    """Another patch that comes from this one: what it was trained on and measured to do is not said of it.

    Args:
        patch: its parent.
        vectors: (L, D).
        fields: of the manifest, what is not the parent's: name, version, base, training, scorecard.
    """
    own: dict[str, Any] = {
        "length": vectors.shape[0],
        "width": vectors.shape[1],
        "sha256": digest(vectors),
        "created": now(),
    }
    own |= {"parents": [patch.manifest.as_parent], "created": now(), "packages": packages()}
    own |= {"data_sha256": None, "training": {}, "scorecard": []}
    return Patch(vectors, replace(patch.manifest, **(own | fields)))


def now() -> str:
    """When something is made, as a manifest says it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def packages() -> dict[str, str]:
    """What it is made with where nothing is trained."""
    return {package: installed(package) for package in ("policypatch", "torch")}
