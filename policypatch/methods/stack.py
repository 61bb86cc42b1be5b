"""Methods of patches that were made before: `stack`, in the order given, and `stacks`, in many orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path

import torch

from policypatch.data.teachers import Teacher
from policypatch.errors import PolicyPatchError
from policypatch.methods.method import Untrained
from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.patch.artifact import check_base, load
from policypatch.patch.stacking import check_parts, stack

WHICH = ("orders", "growing")
TAKEN = ("base", "sft", "patch", "teacher")  # what other arms are called


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

    made_before = True

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

    def arms(self, teachers: Sequence[Teacher]) -> list[Arm]:
        """The base behind them."""
        return [Arm(self.name, vectors=self.patch.vectors)]


class StacksMethod(Untrained):
    """Many stacks of the same patches, each an arm: how patches interfere (arXiv 2511.08484 measures two of them).

    Args:
        patches: folders by the names that arms are called by, joined by +.
        which: `orders`, every order of every choice of them; `growing`, each alone, the first two, three, and so on.
        beside: patches, likewise by name, that are measured alone only.

    Attributes:
        length: vectors of the longest stack.

    Raises:
        PolicyPatchError: no patch, one that does not load, another `which`, or patches of several bases.
    """

    made_before = True

    def __init__(
        self,
        patches: Mapping[str, str],
        which: str = "orders",
        beside: Mapping[str, str] | None = None,
        name: str = "stacks",
    ):
        super().__init__(name)
        if not patches:
            raise PolicyPatchError("method.patches is empty: give folders of patches by name, {tox: a/patch, ...}")
        if which not in WHICH:
            raise PolicyPatchError(f"method.which is {which!r}: choose {' or '.join(WHICH)}")
        if twice := set(patches) & set(beside or {}):
            raise PolicyPatchError(f"method.beside has {sorted(twice)[0]}, as method.patches has: give it another name")
        if wrong := [each for each in {**patches, **(beside or {})} if each in TAKEN or "+" in each]:
            raise PolicyPatchError(
                f"method.patches calls a patch {wrong[0]}: choose a name without +, not an arm's own"
            )
        names = list(patches)
        self.orders: list[tuple[str, ...]] = [(other,) for other in beside or {}]
        if which == "growing":
            self.orders += [(each,) for each in names] + [tuple(names[:size]) for size in range(2, len(names) + 1)]
        else:
            self.orders += [order for size in range(1, len(names) + 1) for order in permutations(names, size)]
        self._loaded = {each: load(Path(folder)) for each, folder in {**patches, **(beside or {})}.items()}
        check_parts(list(self._loaded.values()))
        lengths = {each: patch.manifest.length for each, patch in self._loaded.items()}
        self.length = max(sum(lengths[each] for each in order) for order in self.orders)

    def check(self, base: Base) -> None:
        """Refuse patches of another base."""
        first = next(iter(self._loaded.values())).manifest
        check_base(first, base.identity, (), first.name)

    def arms(self, teachers: Sequence[Teacher]) -> list[Arm]:
        """The base behind each stack, that of all patches last."""
        return [
            Arm("+".join(order), vectors=torch.cat([self._loaded[each].vectors for each in order]))
            for order in self.orders
        ]
