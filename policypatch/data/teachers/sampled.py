"""What teachers share that draw their responses: n of the teacher's and n of the base's, judged, the extremes kept.

Chosen is the teacher's safest response, rejected the base's riskiest, past a margin and absolute thresholds
(arXiv 2511.08484, Eqs. 4-5). A benign prompt's chosen response is the base's own, since the patch should leave it as
it is; its rejected one is the teacher's where that refuses what the base answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import Tensor

from policypatch.data.balance import balanced_pairs
from policypatch.data.cut import cut_rejected
from policypatch.data.pairs import Candidates, Pair, PairFilter, Text, choose_pairs
from policypatch.data.teachers.teacher import PairSet, TeacherContext
from policypatch.errors import PolicyPatchError
from policypatch.model.arm import Arm
from policypatch.model.completions import Completions, complete
from policypatch.model.form import PLAIN, Form
from policypatch.model.sampling import Sampling
from policypatch.model.tree import Item

Side = Callable[[Completions, int, int], Text]
REFUSED = 0.5  # a compliance score below it is a refusal


class SampledTeacher(ABC):
    """Sample, judge, choose.

    Args:
        n: responses a prompt, of the teacher and of the base.
        judges: names of the risk's judges that score them; with several, chosen is safe by all, rejected unsafe by all.
        sampling: how responses are drawn.
        filter: when two of them make a pair.
        name: how the teacher is called in messages.

    Raises:
        PolicyPatchError: a setting that no teacher could use.
    """

    has_likelihood = False
    is_base = False
    """Whether its responses are the base's own, so that both sides of a pair come from the same ones."""

    def __init__(
        self, n: int, judges: Sequence[str], sampling: Mapping[str, Any], filter: Mapping[str, Any], name: str
    ):
        if n < 1:
            raise PolicyPatchError(f"teacher.n is {n}: give at least 1 response a prompt")
        if not judges:
            raise PolicyPatchError("teacher.judges is empty: name at least one of the risk's judges")
        self.name, self.n, self.filter_judges = name, n, tuple(judges)
        self.sampling, self.rule = Sampling(**sampling), PairFilter(**filter)

    def identity(self) -> dict[str, Any]:
        """Everything the pairs depend on beside base, prompts and seed."""
        return {"teacher": self.name, "n": self.n, "judges": list(self.filter_judges)} | {
            "sampling": asdict(self.sampling),
            "filter": asdict(self.rule),
        }

    @abstractmethod
    def check(self, form: Form) -> None:
        """Refuse prompts of a form that the teacher cannot respond to."""

    def form(self, form: Form) -> Form:
        """What the teacher reads around a prompt of the risk's form."""
        return form

    def arm(self, name: str) -> Arm:
        """The teacher as one side of a comparison: the best of its n responses by the judges that choose the pairs."""
        return Arm(name, best_of=self.n, chosen_by=self.filter_judges if self.n > 1 else ())

    @abstractmethod
    def responses(self, context: TeacherContext, prompts: Sequence[str]) -> Completions:
        """The teacher's responses to these prompts."""

    def likelihood(self, context: TeacherContext, pairs: Sequence[Pair], items: Sequence[Item]) -> Tensor:
        """Refused: a teacher with a likelihood of its own says how it is computed."""
        raise PolicyPatchError(f"teacher {self.name} has no log-probabilities: use dpo.reference=sft or base")

    def pairs(self, context: TeacherContext) -> PairSet:
        """Sample, judge, choose."""
        ours = self._base_responses(context, context.prompts)
        theirs = ours if self.is_base else self.responses(context, context.prompts)
        rejected_scores = self._scores(context, ours)
        chosen_scores = rejected_scores if theirs is ours else self._scores(context, theirs)
        hardened = self.rule.hard_negatives and theirs is not ours
        pairs: list[Pair] = []
        hard = 0
        for i, prompt in enumerate(ours.prompts):
            rejected = _candidates(ours, i, rejected_scores)
            chosen = rejected if theirs is ours else _candidates(theirs, i, chosen_scores)
            against: list[tuple[Completions, Candidates, Side]] = [(ours, rejected, _side)]
            if hardened:
                against.append((theirs, chosen, self._side))
            for made, risky, side in against:
                for c, r in choose_pairs(chosen, risky, self.rule):
                    scores = float(chosen.scores[:, c].max()), float(risky.scores[:, r].min())
                    pairs.append(_pair(context, prompt, self._side(theirs, i, c), side(made, i, r), scores))
                    hard += made is not ours
        unsafe = int((np.fmax.reduce(rejected_scores.min(0), 1) >= self.rule.rejected_at_least).sum())
        counts = {"prompts": len(context.prompts), "responses": len(context.prompts) * self.n}
        counts |= {"prompts_with_an_unsafe_one": unsafe, "risk_pairs": len(pairs)}
        if self.rule.hard_negatives:
            counts |= {"hard_negatives": hard}
        if self.rule.cut_rejected:
            judges = {name: context.judges[name] for name in self.filter_judges}
            whole, pairs = pairs, cut_rejected(pairs, judges, self.rule.rejected_at_least, context.base)
            counts |= {"cut": sum(a != b for a, b in zip(whole, pairs, strict=True))}
        asked = [rejected_scores] if theirs is ours else [rejected_scores, chosen_scores]
        if unjudged := sum(int(np.isnan(scores).sum()) for scores in asked):
            counts |= {"unjudged": unjudged}
        if context.benign:
            benign = self._benign_pairs(context)
            refused = sum(pair.rejected is not None for pair in benign)
            counts |= {"benign_prompts": len(context.benign), "benign": len(benign), "benign_refused": refused}
            pairs += benign
        if context.benign_texts:
            texts = self._text_pairs(context)
            counts |= {"benign_texts": len(texts)}
            pairs += texts
        if context.swaps:
            balanced = balanced_pairs(ours, context.swaps)
            counts |= {"balanced": len(balanced)}
            pairs += balanced
        return PairSet(pairs, counts | {"kept": len(pairs)})

    def _benign_pairs(self, context: TeacherContext) -> list[Pair]:
        """The base's own response to each benign prompt where it is a right one, against the teacher's refusal."""
        ours = self._base_responses(context, context.benign)
        scores = self._scores(context, ours)
        if not context.compliance:
            fit = scores.max(0) <= self.rule.chosen_at_most
            refusals: list[Text | None] = [None] * len(context.benign)
        else:
            fit = scores.min(0) >= REFUSED
            refusals = self._refusals(context)
        pairs = []
        for i, prompt in enumerate(context.benign):
            usable = fit[i] & (_written(ours, i) >= max(1, self.rule.min_tokens))
            usable &= ours.all_repetition[i] <= self.rule.max_repetition
            if usable.any():
                pair = _pair(context, prompt, _side(ours, i, int(np.argmax(usable))), refusals[i], (None, None))
                pairs.append(replace(pair, kind="benign"))
        return pairs

    def _text_pairs(self, context: TeacherContext) -> list[Pair]:
        """The base's own continuation of each benign text."""
        texts, n, seed, rows = context.benign_texts, self.n, context.seed, context.decode_rows
        made = complete(context.base, texts, None, n, self.sampling, seed, rows, "benign texts", PLAIN)
        pairs = []
        for i, text in enumerate(texts):
            usable = _written(made, i) >= max(1, self.rule.min_tokens)
            usable &= made.all_repetition[i] <= self.rule.max_repetition
            if usable.any():
                pairs.append(Pair(text, _side(made, i, int(np.argmax(usable))), None, kind="text"))
        return pairs

    def _refusals(self, context: TeacherContext) -> list[Text | None]:
        """For each benign prompt a response of the teacher that refuses it, None where it refuses none."""
        theirs = self.responses(context, context.benign)
        refused = self._scores(context, theirs).max(0) < REFUSED
        found: list[Text | None] = []
        for i in range(len(context.benign)):
            usable = refused[i] & (_written(theirs, i) >= max(1, self.rule.min_tokens))
            found.append(self._side(theirs, i, int(np.argmax(usable))) if usable.any() else None)
        return found

    def _side(self, theirs: Completions, i: int, s: int) -> Text:
        """The teacher's response as a side of a pair; its tokens are the base's."""
        return _side(theirs, i, s)

    def _base_responses(self, context: TeacherContext, prompts: Sequence[str]) -> Completions:
        return complete(
            context.base, prompts, None, self.n, self.sampling, context.seed, context.decode_rows, "pairs", context.form
        )

    def _scores(self, context: TeacherContext, made: Completions) -> np.ndarray:
        """(judges, prompts, n)."""
        return np.stack([made.scores(context.judges[name]) for name in self.filter_judges])


def _pair(
    context: TeacherContext,
    prompt: str,
    chosen: Text,
    rejected: Text | None,
    scores: tuple[float | None, float | None],
) -> Pair:
    return Pair(prompt, chosen, rejected, *scores, chat=context.form.chat)


def _candidates(made: Completions, i: int, scores: np.ndarray) -> Candidates:
    return Candidates(scores[:, i], _written(made, i), made.all_repetition[i])


def _written(made: Completions, i: int) -> np.ndarray:
    """(n,) lengths, 0 for white space: it is judged safe, and yet is no response to learn from."""
    return made.all_lengths[i] * np.array([bool(text.strip()) for text in made.texts[i]])


def _side(made: Completions, i: int, s: int) -> Text:
    return Text(made.texts[i][s], tuple(made.tokens[i][s]), made.ended(i, s))
