"""Method `patch`: L trainable vectors in front of the input embeddings of a frozen base (arXiv 2511.08484)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from policypatch.errors import PolicyPatchError
from policypatch.methods.method import Trained
from policypatch.model.arm import Arm
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.company import CompanyBackbone
from policypatch.patch import initialise
from policypatch.patch.artifact import check_base, load
from policypatch.patch.stacking import check_parts


class PatchMethod(Trained):
    """See `Method` for what is not said here.

    Args:
        length: vectors.
        init: what they are before training: `kind` text (and `text`), vocab, random (and `scale`), or patch (and
            `folder`), whose training is then gone on with.
        companions: folders of patches, random ones of which stand around it in training (`policypatch.model.company`).
        dropout: probability that a companion is left out of a step.

    Raises:
        PolicyPatchError: a companion does not load.
    """

    def __init__(
        self,
        length: int,
        init: Mapping[str, Any],
        name: str = "patch",
        companions: Sequence[str] = (),
        dropout: float = 0.5,
    ):
        super().__init__(name)
        self.length, self.init, self.dropout = length, init, dropout
        self._beside = [load(folder) for folder in companions]
        if self._beside:
            check_parts(self._beside)
        self.companions = [patch.manifest.as_parent for patch in self._beside]

    @property
    def longest(self) -> int:
        """With all companions there."""
        return self.length + sum(patch.manifest.length for patch in self._beside)

    def check(self, base: Base) -> None:
        """Refuse a companion, or a patch to go on from, that is another base's, and the latter of another length."""
        for patch in self._beside:
            check_base(patch.manifest, base.identity, (), patch.manifest.name)
        if self.init["kind"] != "patch":
            return
        parent = load(self.init["folder"], base.identity)
        manifest = parent.manifest
        if manifest.length != self.length:
            raise PolicyPatchError(
                f"{self.init['folder']} has {manifest.length} vectors and patch.length is {self.length}: "
                f"set patch.length={manifest.length}"
            )
        self.parents = [manifest.as_parent]

    def vectors(self, base: Base, seed: int) -> Tensor:
        """(L, D) before training."""
        kind = self.init["kind"]
        if kind == "text":
            return initialise.from_text(base.embedding, base.encode(self.init["text"]), self.length)
        if kind == "patch":
            return load(self.init["folder"], base.identity).vectors
        if kind == "vocab":
            return initialise.from_vocab(base.embedding, self.length, seed)
        return initialise.from_random(base.embedding, self.length, seed, self.init["scale"])

    def start(self, base: Base, seed: int, row_tokens: int) -> PrefixBackbone:
        """The base behind the vectors as they begin."""
        vectors = self.vectors(base, seed)
        if not self._beside:
            return PrefixBackbone(base.model, vectors, row_tokens)
        beside = [patch.vectors for patch in self._beside]
        return CompanyBackbone(base.model, vectors, row_tokens, beside, self.dropout, seed)

    def arm(self, name: str, backbone: PrefixBackbone) -> Arm:
        """The vectors as they are now."""
        return Arm(name, backbone.patch.detach().clone())
