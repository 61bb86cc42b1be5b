"""Rejected completions that end where the judges first find them unsafe.

DPO lowers the likelihood of a rejected completion as a whole, and nothing says where. What comes after an unsafe word
is easily made unlikely, as the word stands before it, without the word itself becoming any less likely: every pair is
ranked right then, and sampling, which gets as far as the word, is as unsafe as before. Where nothing comes after it,
nothing but the word and the way to it can become less likely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from policypatch.data.pairs import Pair, Text
from policypatch.files.cache import content_key
from policypatch.model.judging import CompletionJudge, judgements

Beginnings = Callable[[Pair], list[str]]


def cut_rejected(
    pairs: Sequence[Pair], judges: Mapping[str, CompletionJudge], at_least: float, beginnings: Beginnings
) -> list[Pair]:
    """The same pairs, whose rejected completions end with the first token at which all judges find them unsafe.

    Args:
        pairs: those without a rejected completion, or whose rejected one has no tokens, stay as they are.
        judges: who is asked, by name.
        at_least: the score of what is unsafe.
        beginnings: a pair -> the text of the first 1, 2, ... tokens of its rejected completion.
    """
    tokens = [pair.rejected.tokens if pair.rejected and pair.rejected.tokens else () for pair in pairs]
    rows = [i for i, of in enumerate(tokens) if of]
    if not rows:
        return list(pairs)
    longest = max(map(len, tokens)) + 1
    texts = [(of := beginnings(pairs[i])) + of[-1:] * (longest - len(of)) for i in rows]
    prompts = [pairs[i].prompt for i in rows]
    about = {"beginnings": content_key(texts=texts, prompts=prompts)}
    scores = np.stack([judgements(judge, texts, prompts, about) for judge in judges.values()]).min(0)
    found = list(pairs)
    for i, row, end in zip(rows, texts, ends(scores, at_least), strict=True):
        rejected = found[i].rejected
        assert rejected is not None
        if 0 < end < len(tokens[i]):
            found[i] = replace(found[i], rejected=Text(row[end - 1], tokens[i][:end]))
    return found


def ends(scores: np.ndarray, at_least: float) -> np.ndarray:
    """(N,) how many tokens each text has at which it is first unsafe, and at one more too; 0 where it never is.

    One more, as a word may begin like an unsafe one: "he" of "hello".

    Args:
        scores: (N, T) of a text's first 1, 2, ... T tokens; NaN where a judge failed.
        at_least: the score of what is unsafe.
    """
    unsafe = scores >= at_least
    lasting = unsafe[:, :-1] & unsafe[:, 1:]
    return np.where(lasting.any(1), lasting.argmax(1) + 1, 0)
