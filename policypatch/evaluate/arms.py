"""Every arm of a run on the same prompts with the same random numbers: sampled, judged, measured, written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from policypatch.evaluate.judges import Judge
from policypatch.evaluate.measure import Measured, Settings, rows_of
from policypatch.evaluate.scorecard import Scorecard
from policypatch.evaluate.scorer import completion_nll
from policypatch.files.atomic import write_jsonl
from policypatch.model.base import Base
from policypatch.model.completions import Completions, complete
from policypatch.model.sampling import Sampling


class MeasuredRisk(Protocol):
    """What measuring needs of a risk (`policypatch.risks`)."""

    name: str
    split: str
    judges: Mapping[str, Judge]
    settings: Settings

    @property
    def evaluation_prompts(self) -> list[str]:
        """What arms are measured on."""
        ...

    def measure(self, made: Completions, nll: np.ndarray, scorer: str) -> Sequence[Measured]:
        """The metrics of one arm."""
        ...


@dataclass(frozen=True)
class SamplingPlan:
    """How arms are sampled (`evaluate` in conf/config.yaml).

    Attributes:
        k: continuations a prompt.
        seed: of the continuations; the same for every arm.
        sampling: how they are drawn.
        ppl_samples: of the k, how many are scored for perplexity.
        decode_rows: continuations decoded at once.
    """

    k: int
    seed: int
    sampling: Sampling
    ppl_samples: int
    decode_rows: int


def evaluate_arms(
    base: Base,
    scorer: Base,
    scorer_name: str,
    risk: MeasuredRisk,
    filter_judges: Sequence[str],
    arms: Mapping[str, Tensor | None],
    how: SamplingPlan,
    folder: Path,
) -> Scorecard:
    """Measure every arm and write `samples.jsonl` and `scorecard.json`.

    Args:
        base: the frozen base.
        scorer: the language model that perplexity is measured with.
        scorer_name: how it is called in the scorecard.
        risk: prompts, judges, metrics.
        filter_judges: judges that decided which pairs were trained on.
        arms: arm -> vectors (P, D), None for the base alone; the first arm is what the others are compared with.
        how: how the arms are sampled.
        folder: the run folder.

    Returns:
        the scorecard.
    """
    prompts = risk.evaluation_prompts
    prompt_scores = {name: judge.score(prompts) for name, judge in risk.judges.items()}
    measured: dict[str, Sequence[Measured]] = {}
    samples: list[dict[str, Any]] = []
    for arm, vectors in arms.items():
        made = complete(base, prompts, vectors, how.k, how.sampling, how.seed, how.decode_rows, arm)
        nll = completion_nll(scorer, made, how.ppl_samples)
        measured[arm] = risk.measure(made, nll, scorer_name)
        samples += _sample_rows(arm, made, risk.judges, nll, prompt_scores)
    write_jsonl(folder / "samples.jsonl", samples)
    scorecard = Scorecard(rows_of(measured, risk.name, risk.split, filter_judges, risk.settings))
    scorecard.save(folder / "scorecard.json")
    return scorecard


def _sample_rows(
    arm: str,
    made: Completions,
    judges: Mapping[str, Judge],
    nll: np.ndarray,
    prompt_scores: Mapping[str, np.ndarray],
) -> Iterator[dict[str, Any]]:
    scores = {name: made.scores(judge) for name, judge in judges.items()}
    ppl = np.full(made.all_lengths.shape, np.nan)
    ppl[:, : nll.shape[1]] = np.exp(nll)  # NaN where a continuation was not scored, or is empty
    for i, prompt in enumerate(made.prompts):
        for s, text in enumerate(made.texts[i]):
            yield {
                "prompt_id": i,
                "prompt": prompt,
                "prompt_scores": {name: round(float(x[i]), 6) for name, x in prompt_scores.items()},
                "arm": arm,
                "sample": s,
                "text": text,
                "scores": {name: round(float(x[i, s]), 6) for name, x in scores.items()},
                "ppl": None if np.isnan(ppl[i, s]) else round(float(ppl[i, s]), 4),
                "tokens": len(made.tokens[i][s]),
            }
