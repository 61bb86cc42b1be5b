"""Balanced rows: where the base writes a word that has a counterpart (he, she), both should be equally likely.

The teacher of a bias cannot say "she" instead of "he" without being biased the other way; what it can say is that
neither is better. The words up to the first such word of a continuation become the prompt of a row, the word and its
counterpart its two completions (counterfactual data augmentation, Zhao et al. 2018, arXiv 1804.06876, of one word).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from policypatch.data.pairs import Pair, Text
from policypatch.model.completions import Completions


def balanced_pairs(made: Completions, swaps: Mapping[str, str]) -> list[Pair]:
    """A row for each continuation that holds one of the words, up to its first one.

    Args:
        made: the base's continuations of texts.
        swaps: word -> counterpart, in lower case. A continuation whose first word of these has no counterpart of its
            own ("her", which is that of "his" and of "him") gives no row: from there on the gender is told.
    """
    listed = "|".join(map(re.escape, sorted({*swaps, *swaps.values()})))
    words = re.compile(rf"(?<!\w)(?:{listed})(?!\w)", re.IGNORECASE)
    found: dict[tuple[str, str], Pair] = {}
    for prompt, texts in zip(made.prompts, made.texts, strict=True):
        for text in texts:
            match = words.search(text)
            if match is None or match[0].lower() not in swaps:
                continue
            if not text[: match.start()].endswith(" "):
                continue  # a word at the start of a line or in quotation marks is another token than the usual one
            word = match[0]
            before = prompt + text[: match.start()].rstrip(" ")
            sides = (Text(f" {word}"), Text(f" {_as(word, swaps[word.lower()])}"))
            found.setdefault((before, word.lower()), Pair(before, *sides, kind="balanced"))
    return list(found.values())


def _as(word: str, counterpart: str) -> str:
    """The counterpart in the word's case."""
    return counterpart.capitalize() if word[0].isupper() else counterpart
