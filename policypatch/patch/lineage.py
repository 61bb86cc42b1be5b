"""Patches that come from others: what such a one says of itself."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from policypatch.errors import PolicyPatchError
from policypatch.patch.artifact import Patch, digest


def derived(patch: Patch, vectors: torch.Tensor, **fields: Any) -> Patch:
    """Another patch that comes from this one: what it was trained on and measured to do is not said of it.

    Args:
        patch: its parent, but where vectors and weights are the same: then they have the same parents.
        vectors: (L, D).
        fields: of the manifest, what is not the parent's: name, version, base, training, scorecard.
    """
    own: dict[str, Any] = {
        "length": vectors.shape[0],
        "width": vectors.shape[1],
        "sha256": digest(vectors),
        "created": now(),
    }
    own |= {"parents": [patch.manifest.as_parent], "packages": packages()}
    own |= {"data_sha256": None, "training": {}, "scorecard": []}
    base = fields.get("base", patch.manifest.base)
    if (own["sha256"], base.weights) == (patch.manifest.sha256, patch.manifest.base.weights):
        own["parents"] = patch.manifest.parents  # the same vectors for the same weights: none is its own parent
    return Patch(vectors, replace(patch.manifest, **(own | fields)))


def now() -> str:
    """When something is made, as a manifest says it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def packages(*names: str) -> dict[str, str]:
    """The versions of these packages, by which something is made; by default of those that no patch is made without.

    Raises:
        PolicyPatchError: one of them is not installed, as of a checkout that is on Python's path alone.
    """
    try:
        return {name: version(name) for name in names or ("policypatch", "torch")}
    except PackageNotFoundError as error:
        raise PolicyPatchError(
            f"{error.name} is not installed, so a patch could not say what made it: pip install -e . in the checkout"
        ) from error
