"""Rejected completions that end where the judges first find them unsafe.

DPO lowers the likelihood of a rejected completion as a whole, and nothing says where. What comes after an unsafe word
is easily made unlikely, as the word stands before it, without the word itself becoming any less likely: every pair is
ranked right then, and sampling, which gets as far as the word, is as unsafe as before. Where nothing comes after it,
nothing but the word and the way to it can become less likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from policypatch.data.pairs import Pair, Text
from policypatch.files.cache import content_key
from policypatch.model.base import Base
from policypatch.model.judging import CompletionJudge, judgements


def cut_rejected(
    pairs: Sequence[Pair], judges: Mapping[str, CompletionJudge], at_least: float, base: Base
) -> list[Pair]:
    """The same pairs, whose rejected completions end with their first unsafe token where they have one.

    Args: see `first_unsafe`.
    """
    found = first_unsafe(pairs, judges, at_least, base)
    return [pair if end is None else replace(pair, rejected=end) for pair, end in zip(pairs, found, strict=True)]


def first_unsafe(
    pairs: Sequence[Pair], judges: Mapping[str, CompletionJudge], at_least: float, base: Base
) -> list[Text | None]:
    """Each pair's rejected completion up to the first token at which all judges find it unsafe.

    None where they never do, and where there is no rejected completion or it has no tokens.

    Args:
        pairs: N of them.
        judges: who is asked, by name.
        at_least: the score of what is unsafe.
        base: whose tokens the completions have.
    """
    rejected = {i: pair.rejected for i, pair in enumerate(pairs) if pair.rejected and pair.rejected.tokens}
    found: list[Text | None] = [None] * len(pairs)
    if not rejected:
        return found
    read = [_beginnings(base, pairs[i], of.tokens or ()) for i, of in rejected.items()]
    longest = max(map(len, read)) + 1
    texts = [of + of[-1:] * (longest - len(of)) for of in read]
    prompts = [pairs[i].prompt for i in rejected]
    about = {"beginnings": content_key(texts=texts, prompts=prompts)}
    scores = np.stack([judgements(judge, texts, prompts, about) for judge in judges.values()]).min(0)
    for (i, of), row, end in zip(rejected.items(), read, ends(scores, at_least).tolist(), strict=True):
        if end:
            found[i] = of if end == len(row) else Text(row[end - 1], (of.tokens or ())[:end])
    return found


def _beginnings(base: Base, pair: Pair, tokens: Sequence[int]) -> list[str]:
    """The text of the first 1, 2, ... of a completion's tokens."""
    before = base.encode_prompt(pair.prompt, pair.form)
    return [base.decode_after(before, tokens[: n + 1]) for n in range(len(tokens))]


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
