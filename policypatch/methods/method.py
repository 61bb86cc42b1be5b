"""What every method is: a name, and the arm that is compared with the base; some are trained before."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
    def arm(self, teacher: Teacher) -> Arm | None:
        """What is compared with the base; None where that alone is measured.

        Raises:
            PolicyPatchError: this teacher allows no such arm.
        """

    def arms(self, teacher: Teacher) -> list[Arm]:
        """All that are compared with the base, where a method stands for several."""
        arm = self.arm(teacher)
        return [] if arm is None else [arm]


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
