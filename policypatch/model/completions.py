"""Completions of a list of prompts, sampled once and kept: for pairs and for evaluation alike.

Samples and judgements are cached under everything they depend on, so the runs of a sweep share the base's samples,
and another filter costs no decoding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from policypatch import ranks
from policypatch.files.atomic import read_json, write_json
from policypatch.files.cache import begun, content_key, entry
from policypatch.model.base import Base
from policypatch.model.decode import sample
from policypatch.model.form import PLAIN, Form
from policypatch.model.judging import CompletionJudge, judgements
from policypatch.model.sampling import Sampling
from policypatch.patch.artifact import digest
from policypatch.progress import track

log = logging.getLogger(__name__)

SAMPLER = 2
"""Goes up when the same settings draw other samples than before, so that those in caches are not taken for them."""


@dataclass(frozen=True)
class Completions:
    """k completions of each prompt.

    Attributes:
        key: the cache key they are kept under.
        prompts: the prompts' texts.
        tokens: tokens[i][s] are the ids of sample s of prompt i, without the token that ended it.
        texts: the same as text.
        form: what stood around the prompts.
        max_new_tokens: the length limit; a shorter completion ended itself.
    """

    key: str
    prompts: Sequence[str]
    tokens: list[list[list[int]]]
    texts: list[list[str]]
    max_new_tokens: int
    form: Form = PLAIN

    @property
    def k(self) -> int:
        """Samples a prompt."""
        return len(self.texts[0])

    @cached_property
    def all_lengths(self) -> np.ndarray:
        """(prompts, k) tokens of each completion."""
        return np.array([[len(c) for c in row] for row in self.tokens])

    @cached_property
    def all_repetition(self) -> np.ndarray:
        """(prompts, k) share of repeated trigrams."""
        return np.array([[trigram_repetition(c) for c in row] for row in self.tokens])

    def ended(self, i: int, s: int) -> bool:
        """Whether sample s of prompt i ended itself before the length limit."""
        return len(self.tokens[i][s]) < self.max_new_tokens

    def safest(self, n: int, judges: Sequence[CompletionJudge]) -> Completions:
        """Of every n samples of a prompt the one that scores lowest by the judge that finds it riskiest.

        A blank one is taken only where all n are, as judges find nothing wrong with it, and so is one that a judge
        failed on.
        """
        rows, kept = len(self.texts), self.k // n
        worst = np.stack([self.scores(judge) for judge in judges]).max(0)
        blank = np.array([[not text.strip() for text in row] for row in self.texts])
        best = np.where(blank | np.isnan(worst), np.inf, worst).reshape(rows, kept, n).argmin(2) + np.arange(kept) * n
        chosen = [judge.fingerprint for judge in judges]
        return replace(
            self,
            key=content_key(completions=self.key, best_of=n, judges=chosen),
            tokens=[[self.tokens[i][s] for s in best[i]] for i in range(rows)],
            texts=[[self.texts[i][s] for s in best[i]] for i in range(rows)],
        )

    def scores(self, judge: CompletionJudge) -> np.ndarray:
        """(prompts, k) the judge's scores, kept beside the samples; NaN where it failed on a text."""

        scores = judgements(judge, self.texts, self.prompts, {"completions": self.key})
        if failed := int(np.isnan(scores).sum()):
            log.warning(
                "%d of %d texts have no score by %s, and count nowhere by it; to have them judged again: "
                "policypatch cache --clean --kind judgements",
                *(failed, scores.size, judge.name),
            )
        return scores


def trigram_repetition(tokens: Sequence[int]) -> float:
    """Share of trigrams that repeat an earlier one: 1 - distinct / total, in [0, 1).

    A sequence of fewer than 3 tokens has no trigram and repeats nothing: 0.0. It grows with length, so
    compare continuations of equal budget.
    """
    total = len(tokens) - 2
    if total < 1:
        return 0.0
    return 1.0 - len(set(zip(tokens, tokens[1:], tokens[2:], strict=False))) / total


def complete(
    base: Base,
    prompts: Sequence[str],
    patch: Tensor | None,
    k: int,
    sampling: Sampling,
    seed: int,
    max_rows: int,
    what: str,
    form: Form = PLAIN,
) -> Completions:
    """Sample k completions of each prompt, or take them from the cache.

    Args:
        base: the base; its identity is part of the key.
        prompts: texts to continue or requests to answer, as `form` says.
        patch: (P, D) vectors in front, or None for the base alone.
        k: samples a prompt.
        sampling: how they are drawn.
        seed: fixes them.
        max_rows: completions decoded at once; changes nothing but speed and memory.
        what: named beside the progress bar.
        form: what stands around each prompt.
    """
    about = {
        "base": asdict(base.identity),
        "dtype": str(base.model.dtype),
        "patch": None if patch is None else digest(patch.detach().float().cpu()),
        "prompts": list(prompts),
        "k": k,
        "sampling": asdict(sampling),
        "seed": seed,
        "eos": list(base.eos),
        "sampler": SAMPLER,
        "form": asdict(form),
    }
    key = content_key(**about)

    encoded = [base.encode_prompt(prompt, form) for prompt in prompts]

    def make(rows: range) -> list[list[list[int]]]:
        ours = [encoded[i] for i in rows]
        with track(f"sampling for {what}", len(rows)) as advance, begun("completions", key, rows) as journal:
            known = {i: made for row in journal.rows for i, made in zip(*row, strict=True)}

            def finished(numbers: list[int], completions: list[list[list[int]]]) -> None:
                if any(i not in known for i in numbers):
                    journal.add([numbers, completions])
                advance(len(numbers))

            started = time.monotonic()
            made = sample(base.model, ours, patch, k, sampling, seed, base.eos, max_rows, known, finished)
            drawn = sum(len(c) for i, row in enumerate(made) if i not in known for c in row)
            if drawn:
                seconds = time.monotonic() - started
                log.info("sampling for %s: %d tokens in %.0f s, %.0f a second", what, drawn, seconds, drawn / seconds)
            return made

    def build(folder: Path) -> None:
        write_json(folder / "tokens.json", [row for part in ranks.parts(len(encoded), make) for row in part])

    shown = {name: value for name, value in about.items() if name != "prompts"}
    folder = entry("completions", key, build, about=shown, together=True)
    tokens = read_json(folder / "tokens.json")
    texts = [[base.decode_after(before, c) for c in row] for before, row in zip(encoded, tokens, strict=True)]
    return Completions(key, list(prompts), tokens, texts, sampling.max_new_tokens, form)
