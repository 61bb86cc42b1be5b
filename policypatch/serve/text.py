"""Tokens become text piece by piece, and a stop text ends it."""

from __future__ import annotations

from collections.abc import Sequence

from policypatch.model.base import Base

BEFORE = 8  # tokens of the prompt that the first piece is decoded behind
HALF = "\N{REPLACEMENT CHARACTER}"  # what a character shows as until its last byte has come
GARBAGE = 64  # of these at the end become no characters any more


class Writer:
    """The text of one answer.

    A piece is what decoding has more than it had a token ago: decoded alone, a token loses its first space under
    SentencePiece, and a character of several tokens is none until the last.

    Args:
        base: whose tokens these are.
        prompt: what the answer stands behind.
        stop: texts that end it and are no part of it.
    """

    def __init__(self, base: Base, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._base, self._tokens, self._stop = base, list(prompt[-BEFORE:]), [text for text in stop if text]
        self._start, self._read, self._given = 0, len(self._tokens), 0
        self._held, self.stopped = "", False

    def add(self, token: int) -> str:
        """The text that a token has made certain, up to a stop text."""
        self._tokens.append(token)
        new = self._new()
        sure = new.rstrip(HALF)
        if len(sure) < len(new) <= len(sure) + GARBAGE:  # the end may yet become a character
            self._held += sure[self._given :]
            self._given = max(self._given, len(sure))
        elif new:
            self._held += new[self._given :]
            self._start, self._read, self._given = self._read, len(self._tokens), 0
        return self._until_stop(last=False)

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        self._held += self._new()[self._given :]
        return self._until_stop(last=True)

    def _new(self) -> str:
        """What the tokens since the last certain one have added to the text."""
        before = self._base.decode(self._tokens[self._start : self._read])
        return self._base.decode(self._tokens[self._start :])[len(before) :]

    def _until_stop(self, last: bool) -> str:
        """What may be said of the text that is held."""
        # Of several the one that is complete first, so that it does not depend on how text comes in pieces.
        found = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)[1]], "", True
            return text
        keep = 0 if last else max((_overlap(self._held, text) for text in self._stop), default=0)
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
