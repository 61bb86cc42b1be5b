"""An arm: one side of a comparison, the base as some method has changed it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.form import UNGUIDED, Guidance
from policypatch.model.lora import LoRABackbone, LoRAState
from policypatch.patch.artifact import digest


@dataclass(frozen=True)
class Arm:
    """What is asked, judged and compared. Without anything but a name it is the base itself.

    Attributes:
        name: how scorecards call it.
        vectors: (P, D) in front of everything.
        guidance: what the base is told before every prompt.
        lora: values of the adapters in the base.
        other: another model, asked in the base's place.
        best_of: a completion is the safest of this many.
        chosen_by: names of the judges that say which that is.
    """

    name: str
    vectors: Tensor | None = None
    guidance: Guidance = UNGUIDED
    lora: LoRAState | None = None
    other: Base | None = None
    best_of: int = 1
    chosen_by: tuple[str, ...] = ()

    @property
    def is_base(self) -> bool:
        """Whether it is the base as it is."""
        changed = (self.vectors, self.lora, self.other)
        return all(part is None for part in changed) and self.guidance == UNGUIDED and self.has_likelihood

    @property
    def has_likelihood(self) -> bool:
        """Whether it assigns probabilities to text; one that chooses among samples does not."""
        return self.best_of == 1

    @contextmanager
    def on(self, base: Base) -> Iterator[Base]:
        """The model that is asked, for as long as the block lasts; `vectors` and `guidance` are not in it."""
        if self.lora is None:
            yield self.other or base
        else:
            with self.lora.applied():
                yield self.lora.base

    def backbone(self, base: Base, row_tokens: int) -> PrefixBackbone:
        """What reads a tree of tokens under this arm and, for comparison, under the base; within `on`."""
        if self.lora is not None:
            return LoRABackbone(self.lora.lora, row_tokens)
        vectors = base.embedding[:0].float() if self.vectors is None else self.vectors
        return PrefixBackbone(base.model, vectors.to(base.model.device), row_tokens)

    def identity(self, base: Base) -> dict[str, Any]:
        """What a figure of this arm depends on beside the prompts, for a cache key."""
        asked = self.other or (base if self.lora is None else self.lora.base)
        known = {
            "base": asdict(asked.identity),
            "dtype": str(asked.model.dtype),
            "patch": None if self.vectors is None else digest(self.vectors.detach().float().cpu()),
        }
        return known if self.guidance == UNGUIDED else known | {"guidance": asdict(self.guidance)}
