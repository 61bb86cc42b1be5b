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
    """The same pairs, whose rejected completions end with their first unsafe token where they have one.

    Args: see `first_unsafe`.
    """
    found = []
    for pair, end in zip(pairs, first_unsafe(pairs, judges, at_least, beginnings), strict=True):
        if pair.rejected and pair.rejected.tokens and 0 < end < len(pair.rejected.tokens):
            pair = replace(pair, rejected=Text(beginnings(pair)[end - 1], pair.rejected.tokens[:end]))
        found.append(pair)
    return found


def first_unsafe(
    pairs: Sequence[Pair], judges: Mapping[str, CompletionJudge], at_least: float, beginnings: Beginnings
) -> list[int]:
    """Which token of each pair's rejected completion, from 1, is the first at which all judges find it unsafe.

    0 where they never do, and where there is no rejected completion or it has no tokens.

    Args:
        pairs: N of them.
        judges: who is asked, by name.
        at_least: the score of what is unsafe.
        beginnings: a pair -> the text of the first 1, 2, ... tokens of its rejected completion.
    """
    rows = [i for i, pair in enumerate(pairs) if pair.rejected and pair.rejected.tokens]
    if not rows:
        return [0] * len(pairs)
    read = [beginnings(pairs[i]) for i in rows]
    longest = max(map(len, read)) + 1
    texts = [of + of[-1:] * (longest - len(of)) for of in read]
    prompts = [pairs[i].prompt for i in rows]
    about = {"beginnings": content_key(texts=texts, prompts=prompts)}
    scores = np.stack([judgements(judge, texts, prompts, about) for judge in judges.values()]).min(0)
    found = dict(zip(rows, ends(scores, at_least).tolist(), strict=True))
    return [found.get(i, 0) for i in range(len(pairs))]


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
