"""Method `stack`: patches that were made before, one or several, in the order in which they stand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from policypatch.data.teachers import Teacher
from policypatch.errors import PolicyPatchError
from policypatch.methods.method import Untrained
from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.patch.artifact import check_base, load
from policypatch.patch.stacking import stack


class StackMethod(Untrained):
    """Nothing is trained: what stands in front of the base is what the patches hold.

    Args:
        patches: folders of patches; they stand in this order.

    Attributes:
        patch: what they are together.
        length: its vectors.

    Raises:
        PolicyPatchError: no folder is given, one does not load, or they are not of one base.
    """

    def __init__(self, patches: Sequence[str], name: str = "stack"):
        super().__init__(name)
        if not patches or isinstance(patches, str):
            raise PolicyPatchError(
                f"method.patches is {patches!r}: give folders of patches, as 'method.patches=[tox/patch,bias/patch]'"
            )
        loaded = [load(Path(folder)) for folder in patches]
        self.patch = loaded[0] if len(loaded) == 1 else stack(loaded)
        self.length = self.patch.manifest.length

    def check(self, base: Base) -> None:
        """Refuse patches of another base."""
        check_base(self.patch.manifest, base.identity, (), self.patch.manifest.name)

    def arm(self, teacher: Teacher) -> Arm:
        """The base behind them."""
        return Arm(self.name, vectors=self.patch.vectors)
