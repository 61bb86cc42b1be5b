"""Probes of gender bias that need no sampling: next-word mass on gender words, preference between paired sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policypatch.evaluate.likelihoods import next_word_mass
from policypatch.evaluate.measure import filled
from policypatch.evaluate.metrics import GLD, MeanValue, StereotypePreference
from policypatch.evaluate.probes.probe import Bench, Outcome, Plan, Reading, text_nll
from policypatch.files.arrays import rows_array
from policypatch.model.arm import Arm

WORD_TOKENS = 16  # that a listed word may have
AT_ONCE = 32  # prompts between two notes of what is done


@dataclass(frozen=True)
class NextWordProbe:
    """`gld`: how unevenly the next word's probability is spread over male and female words (arXiv 2402.11190).

    `gender_mass`, the probability that it is one of them at all, says how much there is to spread: of next to nothing,
    `gld` is a ratio of rounding errors and no bias that anyone would meet.
    """

    split: str
    prompts: Sequence[str]
    male: Sequence[str]
    female: Sequence[str]
    risk: str = "gender_bias"
    metrics: tuple[str, ...] = ("gld", "gender_mass")
    chat: bool = False
    reads_probabilities: bool = True

    def readings(self, plan: Plan) -> list[Reading]:
        """Prompts, each with a word behind it."""
        return [Reading(self.prompts, new=WORD_TOKENS)]

    def measure(self, bench: Bench, arm: Arm) -> Outcome:
        """The mass on either list behind each prompt."""
        words = [*self.male, *self.female]

        def make(batches: Sequence[range]) -> Iterator[np.ndarray]:
            with arm.on(bench.base) as base:
                for rows in batches:
                    prompts = [arm.guidance.before + self.prompts[i] for i in rows]
                    yield next_word_mass(base, arm.vectors, prompts, words)

        about = {"arm": arm.identity(bench.base), "prompts": list(self.prompts), "words": words}
        mass = rows_array("word_mass", about, len(self.prompts), make, f"next words of {arm.name}", AT_ONCE)
        male = len(self.male)
        both = np.stack([mass[:, :male].sum(1), mass[:, male:].sum(1)], 1)
        return Outcome(
            [
                filled("gld", None, GLD(), torch.from_numpy(both)),
                filled("gender_mass", None, MeanValue(), torch.from_numpy(both.sum(1))),
            ]
        )


@dataclass(frozen=True)
class CrowsPairsProbe:
    """`crows_pairs`: share of pairs whose more stereotypical sentence is the likelier one (Nangia et al. 2020)."""

    split: str
    more: Sequence[str]
    less: Sequence[str]
    risk: str = "gender_bias"
    metrics: tuple[str, ...] = ("crows_pairs",)
    chat: bool = False
    reads_probabilities: bool = True

    def readings(self, plan: Plan) -> list[Reading]:
        """Both sentences of each pair."""
        return [Reading(self.more), Reading(self.less)]

    def measure(self, bench: Bench, arm: Arm) -> Outcome:
        """Log-likelihood of both sentences of each pair."""
        nll = text_nll(bench, arm, [*self.more, *self.less])[:, 0]
        both = -np.stack([nll[: len(self.more)], nll[len(self.more) :]], 1)
        return Outcome([filled("crows_pairs", None, StereotypePreference(), torch.from_numpy(both))])
