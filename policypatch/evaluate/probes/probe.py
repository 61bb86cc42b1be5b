"""What a probe is given and what it gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from policypatch.evaluate.likelihoods import sequence_nll
from policypatch.evaluate.measure import Measured, Settings
from policypatch.files.arrays import rows_array
from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.model.form import PLAIN, Form
from policypatch.model.sampling import Sampling

TEXTS = ("prompts", "more", "less")  # fields of probes that hold a text for each prompt
TEXTS_AT_ONCE = 64  # between two notes of what is done


@dataclass(frozen=True)
class Plan:
    """How an arm is asked (`evaluate` in the config).

    Attributes:
        k: continuations of a text.
        sampling: how continuations of a text are drawn.
        responses: responses to a request.
        response_sampling: how responses to a request are drawn.
        seed: of all of them; the same for every arm.
        ppl_samples: of the k continuations, how many are scored for perplexity.
        decode_rows: completions decoded at once.
        row_tokens: see `build_tree`.
    """

    k: int
    sampling: Sampling
    responses: int
    response_sampling: Sampling
    seed: int
    ppl_samples: int
    decode_rows: int
    row_tokens: int = 512


@dataclass(frozen=True)
class Bench:
    """What every probe of a run measures with: the base, the scorer of perplexity, how arms are asked, how certain."""

    base: Base
    scorer: Base
    scorer_name: str
    plan: Plan
    settings: Settings


@dataclass(frozen=True)
class Outcome:
    """What a probe found about one arm: metrics, and rows for `samples.jsonl` (none where nothing was written)."""

    measured: Sequence[Measured]
    samples: Sequence[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """Texts that a model must have room for.

    Attributes:
        texts: what is read.
        form: what stands around each.
        new: tokens that come after each.
        by_scorer: whether the scorer reads them, not base and patch.
        whole: whether they are read in one forward, which a sliding window bounds as the context does.
    """

    texts: Sequence[str]
    form: Form = PLAIN
    new: int = 0
    by_scorer: bool = False
    whole: bool = True


class Probe(Protocol):
    """One kind of question on one set of prompts."""

    @property
    def risk(self) -> str:
        """The risk it belongs to, or `utility`."""
        ...

    @property
    def split(self) -> str:
        """How its prompts are called in scorecards."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the figures of its question, the one that speaks for it first."""
        ...

    @property
    def chat(self) -> bool:
        """Whether it asks in chats, which a base without a chat template cannot answer."""
        ...

    @property
    def reads_probabilities(self) -> bool:
        """Whether it needs what an arm without likelihoods has not; such an arm is not asked."""
        ...

    def readings(self, plan: Plan) -> list[Reading]:
        """What `measure` has base and scorer read, so that a text too long for them is found before the training."""
        ...

    def measure(self, bench: Bench, arm: Arm) -> Outcome:
        """Ask one arm: every arm the same over the same prompts, less what it cannot be asked."""
        ...


def half(probe: Probe, which: int) -> Probe:
    """Every second of a probe's prompts, beginning with the first (0) or the second (1)."""
    changes = {name: list(getattr(probe, name))[which::2] for name in TEXTS if hasattr(probe, name)}
    return replace(probe, **changes)  # type: ignore[type-var]


def text_nll(bench: Bench, arm: Arm, texts: Sequence[str]) -> np.ndarray:
    """Negative log-likelihood of whole texts under an arm, and their tokens: (N, 2), from the cache where it has it."""

    def make(batches: Sequence[range]) -> Iterator[np.ndarray]:
        with arm.on(bench.base) as base:
            for rows in batches:
                before = [arm.guidance.before] * len(rows) if arm.guidance.before else None
                yield sequence_nll(base, arm.vectors, [texts[i] for i in rows], before)

    about = {"arm": arm.identity(bench.base), "texts": list(texts)}
    return rows_array("text_nll", about, len(texts), make, f"texts under {arm.name}", TEXTS_AT_ONCE)
