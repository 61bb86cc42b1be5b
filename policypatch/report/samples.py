"""The samples of a run report: which prompts are shown, which text of each arm, and what is folded away.

The choice follows a rule that the page prints, so that nobody has to trust our taste: the prompts are
spread evenly over the ranks of the base's score, and every arm shows its worst continuation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from policypatch.report.figures import CUTOFF
from policypatch.report.scorecard import is_number

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """One continuation as the page shows it."""

    arm: str
    text: str
    scores: dict[str, float]
    ppl: float | None
    tokens: int | None
    of: int  # continuations of this prompt by this arm, of which this is the worst
    folded: bool  # some judge scores the text as toxic


@dataclass(frozen=True)
class Prompt:
    """One prompt with a continuation by every arm."""

    prompt_id: str
    prompt: str
    folded: bool
    shown: list[Shown]


def judges_of(samples: Iterable[Sample]) -> list[str]:
    """Every judge that scored a text, in order of appearance."""
    return list(dict.fromkeys(judge for sample in samples for judge in _scores(sample)))


def worst_scores(samples: Iterable[Sample], arms: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """The worst score of every prompt, by judge and arm: what AMT averages and TR counts."""
    worst: dict[str, dict[str, dict[str, float]]] = {}
    for sample in samples:
        prompt_id = str(sample["prompt_id"])
        for judge, score in _scores(sample).items():
            by_prompt = worst.setdefault(judge, {}).setdefault(str(sample["arm"]), {})
            by_prompt[prompt_id] = max(score, by_prompt.get(prompt_id, score))
    return {
        judge: {arm: list(by_arm[arm].values()) for arm in arms if arm in by_arm} for judge, by_arm in worst.items()
    }


def choose(
    samples: Iterable[Sample],
    arms: Iterable[str],
    judge: str | None,
    count: int = 20,
    threshold: float = CUTOFF,
) -> list[Prompt]:
    """About `count` prompts, spread evenly over the ranks of the base's worst score by `judge`.

    Without a base or a judge the prompts are spread over their ids. The order is from low to high.
    What a judge scores `threshold` or more is folded.
    """
    arms = list(arms)
    by_prompt: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        by_prompt.setdefault(str(sample["prompt_id"]), {}).setdefault(str(sample["arm"]), []).append(sample)
    first = "base" if "base" in arms else next(iter(arms), "")

    def rank(prompt_id: str) -> tuple[float, str]:
        group = by_prompt[prompt_id].get(first, [])
        return max((_score(sample, judge) for sample in group), default=0.0), prompt_id

    ordered = sorted(by_prompt, key=rank)
    count = min(count, len(ordered))
    # The middle of each of `count` equal slices: neither end is favoured.
    chosen = [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
    return [_prompt(prompt_id, by_prompt[prompt_id], arms, judge, threshold) for prompt_id in chosen]


def _prompt(
    prompt_id: str, by_arm: Mapping[str, list[Sample]], arms: list[str], judge: str | None, threshold: float
) -> Prompt:
    shown = []
    for arm in arms:
        if group := by_arm.get(arm):
            worst = max(group, key=lambda sample: _score(sample, judge))  # the first one of equals
            shown.append(
                Shown(
                    arm,
                    str(worst["text"]),
                    _scores(worst),
                    worst["ppl"] if is_number(worst.get("ppl")) else None,
                    worst.get("tokens"),
                    len(group),
                    _toxic(_scores(worst), threshold),
                )
            )
    any_sample = next(sample for group in by_arm.values() for sample in group)
    own = any_sample.get("prompt_scores")
    # Where nobody scored the prompt itself: what draws a toxic continuation may be toxic too.
    folded = _toxic(own, threshold) if own else any(text.folded for text in shown)
    return Prompt(prompt_id, str(any_sample["prompt"]), folded, shown)


def _toxic(scores: Mapping[str, Any], threshold: float) -> bool:
    return any(is_number(score) and score >= threshold for score in scores.values())


def _scores(sample: Sample) -> dict[str, float]:
    return {judge: float(score) for judge, score in (sample.get("scores") or {}).items() if is_number(score)}


def _score(sample: Sample, judge: str | None) -> float:
    return _scores(sample).get(judge, 0.0) if judge is not None else 0.0
