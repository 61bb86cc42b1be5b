"""What every risk has: prompts to train on, benign prompts beside them, evaluation sets, judges, and its probes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from policypatch.data.prompts import PromptSet
from policypatch.errors import Number, PolicyPatchError
from policypatch.evaluate.judges import Judge
from policypatch.evaluate.probes import Probe
from policypatch.model.form import PLAIN, Form


class Risk(ABC):
    """A risk as its YAML in `conf/risk/` describes it.

    Args:
        name: how it is called in names, manifests and scorecards.
        train: prompts that pairs are made from.
        evaluation: sets that arms are measured on, by split; the first one speaks for the risk, None is left out.
        judges: by name.
        filter: of these, those that choose the training pairs unless the teacher says otherwise.
        benign: sets of prompts, by name, that the base responds to as it should; trained on so that it stays so.
        benign_texts: texts that the base should go on continuing as it does, for risks whose prompts are requests.
        near: similarity (see `near_duplicates`) from which a training prompt counts as an evaluation one and is left
            out; None leaves out the same texts only.
        threshold: a completion that scores at or above it counts as a case of the risk.

    Raises:
        PolicyPatchError: no evaluation set, no judge, or a filter that is none of the judges.
    """

    form: Form = PLAIN
    """What stands around its prompts."""
    shares: tuple[str, ...] = ()
    """Judges, and metrics without one, that count what training rows are made from; marked as the filter's are."""
    compliance = False
    """Whether judges score how far a request is complied with; see `TeacherContext`."""

    def __init__(
        self,
        name: str,
        train: PromptSet,
        evaluation: Mapping[str, PromptSet | None],
        judges: Mapping[str, Judge],
        filter: Sequence[str] = (),
        benign: Mapping[str, PromptSet | None] | None = None,
        benign_texts: PromptSet | None = None,
        near: float | None = None,
        threshold: float = 0.5,
    ):
        sets = {split: prompts for split, prompts in evaluation.items() if prompts is not None}
        if not sets:
            raise PolicyPatchError("risk.evaluation is empty: name at least one set of prompts")
        if not judges:
            raise PolicyPatchError("risk.judges is empty: name at least one judge")
        if unknown := set(filter) - set(judges):
            raise PolicyPatchError(f"risk.filter names {sorted(unknown)[0]}: choose from {', '.join(judges)}")
        Number(above=0, most=1, null=True).check("risk.near", near)
        Number(above=0, below=1).check("risk.threshold", threshold)
        self.name, self.train, self.evaluation, self.judges = name, train, sets, dict(judges)
        self.benign = {name: prompts for name, prompts in (benign or {}).items() if prompts is not None}
        self._texts = benign_texts
        self.filter, self.near, self.threshold = tuple(filter), near, threshold

    @cached_property
    def training_prompts(self) -> list[str]:
        """What pairs are made from: nothing that stands in an evaluation set, whatever part of it is measured on."""
        return self.train.load("risk.train", without=self._measured_texts, near=self.near)

    @cached_property
    def benign_prompts(self) -> list[str]:
        """What the base should go on responding to as it does; nothing that stands in an evaluation set."""
        return list(dict.fromkeys(prompt for prompts in self.benign_sets for prompt in prompts))

    @cached_property
    def benign_sets(self) -> list[list[str]]:
        """The same, set by set."""
        sets = {f"risk.benign.{name}": prompts for name, prompts in self.benign.items()}
        return [s.load(key, without=self._measured_texts, near=self.near) for key, s in sets.items()]

    @cached_property
    def benign_texts(self) -> list[str]:
        """Texts that the base should go on continuing as it does."""
        if self._texts is None:
            return []
        return self._texts.load("risk.benign_texts", without=self._measured_texts, begun=True)

    @property
    def swaps(self) -> dict[str, str]:
        """Words and the counterparts that should be as likely, for risks that are about an imbalance."""
        return {}

    @cached_property
    def _measured_texts(self) -> list[str]:
        """Every text of every evaluation set, in full."""
        return [text for split, prompts in self.measured_sets().items() for text in prompts.all_texts(self.key(split))]

    def measured_sets(self) -> dict[str, PromptSet]:
        """All sets that arms are measured on, by split."""
        return self.evaluation

    def key(self, split: str) -> str:
        """Where a set stands in the config, for errors."""
        return f"risk.evaluation.{split}"

    def load(self, split: str, limit: int | None) -> list[str]:
        """The prompts of a split, at most `limit`, always the same ones."""
        prompts = self.measured_sets()[split]
        known = [n for n in (prompts.limit, limit) if n is not None]
        return replace(prompts, limit=min(known, default=None)).load(self.key(split))

    @abstractmethod
    def probes(self, limit: int | None) -> list[Probe]:
        """What arms are measured with, the headline's first; at most `limit` prompts of every set."""
