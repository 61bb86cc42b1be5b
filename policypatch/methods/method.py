"""What every method is: a name, and the arm that is compared with the base; some are trained before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from policypatch.data.teachers import Teacher
from policypatch.model.arm import Arm
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.patch.manifest import Parent


class Method:
    """What adapts the base.

    Args:
        name: what its arm is called in scorecards.

    Attributes:
        length: vectors that stand before every prompt.
    """

    length = 0
    made_before = False
    """Whether it stands patches before the base that were trained by other runs, maybe against other risks."""

    def __init__(self, name: str):
        self.name = name
        self.parents: list[Parent] = []  # patches that training goes on from
        self.companions: list[Parent] = []  # patches that training has beside it

    @property
    def longest(self) -> int:
        """Vectors that may stand before a prompt in training."""
        return self.length

    def check(self, base: Base) -> None:
        """Refuse a base that the method cannot be used on, before anything costs time."""


class Untrained(Method, ABC):
    """A method that is there without training."""

    @abstractmethod
    def arms(self, teachers: Sequence[Teacher]) -> list[Arm]:
        """What is compared with the base, each with it and none before another; none where it alone is measured.

        Args:
            teachers: one for each risk that the run is about.

        Raises:
            PolicyPatchError: these teachers allow no such arm.
        """


class Trained(Method, ABC):
    """A method whose tensors both stages train, in a backbone of its own."""

    @abstractmethod
    def start(self, base: Base, seed: int, row_tokens: int) -> PrefixBackbone:
        """The base with what is trained, as it is before training.

        Args:
            base: the frozen base.
            seed: of starting values that are drawn.
            row_tokens: see `build_tree`.
        """

    @abstractmethod
    def arm(self, name: str, backbone: PrefixBackbone) -> Arm:
        """What the training of a backbone that `start` made has come to, kept as it is while the training goes on."""
