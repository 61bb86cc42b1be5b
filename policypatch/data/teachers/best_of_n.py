"""Teacher `best_of_n`: the base itself with a judge's hindsight.

n continuations are sampled for each prompt and judged; chosen is the safest, rejected the most toxic, kept past a
margin and absolute thresholds (arXiv 2511.08484, Eqs. 4-5). It needs no second model, and its text is as fluent as
the base's own; it has no likelihood, so it cannot be DPO's reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from policypatch.data.pairs import Pair, PairFilter, Text, choose_pairs
from policypatch.data.teachers.teacher import PairSet, TeacherContext
from policypatch.errors import PolicyPatchError
from policypatch.model.completions import Completions, complete
from policypatch.model.sampling import Sampling


class BestOfN:
    """Sample n, keep the extremes.

    Args:
        n: continuations a prompt.
        judges: names of the risk's judges that score them; with several, a candidate's score is their maximum, so
            that chosen is safe by all of them, and their minimum for rejected, so that it is toxic by all.
        sampling: how continuations are drawn.
        filter: when two of them make a pair.
    """

    name = "best_of_n"
    has_likelihood = False

    def __init__(
        self, n: int, judges: Sequence[str], sampling: Mapping[str, Any], filter: Mapping[str, Any], name: str = name
    ):
        if n < 2:
            raise PolicyPatchError(f"teacher.n is {n}: choosing needs at least 2 continuations a prompt")
        if not judges:
            raise PolicyPatchError("teacher.judges is empty: name at least one of the risk's judges")
        self.n, self.filter_judges = n, tuple(judges)
        self.sampling, self.rule = Sampling(**sampling), PairFilter(**filter)

    def identity(self) -> dict[str, Any]:
        """Everything the pairs depend on beside base, prompts and seed."""
        return {"teacher": self.name, "n": self.n, "judges": list(self.filter_judges)} | {
            "sampling": asdict(self.sampling),
            "filter": asdict(self.rule),
        }

    def pairs(self, context: TeacherContext) -> PairSet:
        """Sample, judge, choose."""
        made = complete(
            context.base, context.prompts, None, self.n, self.sampling, context.seed, context.decode_rows, "pairs"
        )
        scores = np.stack([made.scores(context.judges[name]) for name in self.filter_judges])  # (judges, prompts, n)
        pairs = [
            pair for i, prompt in enumerate(context.prompts) for pair in self._of_prompt(prompt, made, i, scores[:, i])
        ]
        toxic = int((scores.min(0).max(1) >= self.rule.rejected_at_least).sum())
        counts = {"prompts": len(context.prompts), "continuations": len(context.prompts) * self.n}
        return PairSet(pairs, counts | {"prompts_with_a_toxic_one": toxic, "kept": len(pairs)})

    def _of_prompt(self, prompt: str, made: Completions, i: int, scores: np.ndarray) -> list[Pair]:
        # White space is judged safe, and yet is no response to learn from.
        written = np.array([bool(text.strip()) for text in made.texts[i]])
        found = choose_pairs(scores, made.all_lengths[i] * written, made.all_repetition[i], self.rule)
        return [
            Pair(
                prompt,
                _side(made, i, chosen),
                _side(made, i, rejected),
                float(scores[:, chosen].max()),
                float(scores[:, rejected].min()),
            )
            for chosen, rejected in found
        ]


def _side(made: Completions, i: int, s: int) -> Text:
    return Text(made.texts[i][s], tuple(made.tokens[i][s]), made.ended(i, s))
