"""Methods that need no training: nothing at all, a safety prompt as text, and the teacher itself."""

from __future__ import annotations

from collections.abc import Sequence

from policypatch.data.teachers import Teacher
from policypatch.errors import PolicyPatchError
from policypatch.methods.method import Untrained
from policypatch.model.arm import Arm
from policypatch.model.form import Guidance


class NoMethod(Untrained):
    """The base alone."""

    def arms(self, teachers: Sequence[Teacher]) -> list[Arm]:
        """No arm beside it."""
        return []


class PromptMethod(Untrained):
    """A fixed safety prompt: the system message of a chat, and what stands before a text to continue.

    Args:
        text: the prompt.

    Raises:
        PolicyPatchError: it is empty.
    """

    def __init__(self, text: str, name: str = "prompt"):
        super().__init__(name)
        if not isinstance(text, str) or not text.strip():
            raise PolicyPatchError("prompt.text is empty: say what the base is told")
        self.text = text.strip()

    def arms(self, teachers: Sequence[Teacher]) -> list[Arm]:
        """The base behind it."""
        return [Arm(self.name, guidance=Guidance(system=self.text, before=f"{self.text}\n\n"))]


class TeacherMethod(Untrained):
    """The teacher that pairs come from: what the others are to come near to."""

    def arms(self, teachers: Sequence[Teacher]) -> list[Arm]:
        """As the teacher answers, where there is one."""
        if len(teachers) > 1:
            raise PolicyPatchError("method=teacher stands for one teacher, and risk=joint has several: choose one risk")
        return [teachers[0].arm(self.name)]
