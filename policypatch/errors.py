"""The one exception that a user is meant to read, and the sentence about a number that cannot be used."""

from __future__ import annotations

import math
from dataclasses import dataclass


class PolicyPatchError(Exception):
    """A mistake in what the user gave us, told in one sentence.

    The message names the config key, file or row that is wrong and says what to do about it.
    `run.py` prints it without a traceback and exits with status 2.
    """


class AtPrompt(PolicyPatchError):
    """A mistake that came up at one prompt; who knows the config adds its file and row (`policypatch.places`).

    Attributes:
        prompt: the prompt.
    """

    def __init__(self, message: str, prompt: str = "") -> None:
        super().__init__(message)
        self.prompt = prompt


class ForeignFolder(PolicyPatchError):
    """A folder that holds a run of another configuration."""


@dataclass(frozen=True)
class Number:
    """What a number that a user gives may be; finite in any case, and true or false is none.

    Attributes:
        least: the least value allowed.
        most: the greatest value allowed.
        above: every value allowed is greater.
        below: every value allowed is less.
        whole: whether it must be an integer.
        null: whether None is allowed, too.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False
    null: bool = False

    def check(self, key: str, value: object) -> None:
        """Refuse a value.

        Raises:
            PolicyPatchError: naming the key, the value and what is allowed.
        """
        if not (self._allows(value) or (self.null and value is None)):
            raise PolicyPatchError(f"{key} is {value!r}: it must be {self}")

    def _allows(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """What is allowed, in words."""
        named = {
            "at least": self.least,
            "greater than": self.above,
            "at most": self.most,
            "less than": self.below,
        }
        bounds = " and ".join(f"{words} {bound}" for words, bound in named.items() if bound is not None)
        kind = "a whole number" if self.whole else "a number"
        return ", ".join([kind, *([bounds] if bounds else []), *(["or null"] if self.null else [])])
