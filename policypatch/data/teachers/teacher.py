"""What every teacher is given and what it gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from policypatch.data.pairs import Pair, load_pairs
from policypatch.data.prompts import begins_with_one, normalise
from policypatch.files.atomic import read_json
from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.model.form import PLAIN, Form
from policypatch.model.judging import CompletionJudge
from policypatch.model.tree import Item


@dataclass(frozen=True)
class TeacherContext:
    """What a teacher may use.

    Attributes:
        base: the base.
        prompts: the risk's training prompts.
        judges: the risk's judges, by name.
        seed: of what is sampled.
        decode_rows: completions decoded at once.
        form: what stands around a prompt.
        benign: prompts that the base responds to as it should.
        benign_texts: texts that the base continues as it should, whatever form the prompts have.
        swaps: words and their counterparts; wherever the base writes one, the other should be as likely.
        compliance: whether a score says how far a response complies with a request, so that a high one is right on
            benign prompts; otherwise a score is the risk of the text itself, and a low one is right on all prompts.
        row_tokens: see `build_tree`.
    """

    base: Base
    prompts: Sequence[str]
    judges: Mapping[str, CompletionJudge]
    seed: int
    decode_rows: int
    form: Form = PLAIN
    benign: Sequence[str] = ()
    benign_texts: Sequence[str] = ()
    swaps: Mapping[str, str] = field(default_factory=dict)
    compliance: bool = False
    row_tokens: int = 512


@dataclass(frozen=True)
class PairSet:
    """Pairs, and what was met on the way to them (counts, for the report).

    Attributes:
        pairs: the rows.
        counts: by what is counted.
        risks: for each row which of several risks it is of, by number; empty where there is one.
    """

    pairs: list[Pair]
    counts: dict[str, int]
    risks: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[int, ...]:
        """For each row which risk it is of."""
        return self.risks or (0,) * len(self.pairs)

    @property
    def sha256(self) -> str:
        """Digest of the pairs' content, for the manifest."""
        rows = json.dumps([asdict(pair) for pair in self.pairs], sort_keys=True)
        return hashlib.sha256(rows.encode()).hexdigest()

    def without(self, prompts: Collection[str], begun: bool = False) -> PairSet:
        """The set less the pairs of these prompts (normalised): what arms are measured on must not be trained on.

        Args:
            prompts: what arms are asked.
            begun: also leave out texts that begin with one of them, as a sentence does whose beginning is asked.
        """

        def measured(pair: Pair) -> bool:
            text = normalise(pair.prompt)
            return text in prompts or (begun and pair.kind == "text" and begins_with_one(text, prompts))

        kept = [i for i, pair in enumerate(self.pairs) if not measured(pair)]
        dropped = {"of_evaluation_prompts": len(self.pairs) - len(kept)} if len(kept) < len(self.pairs) else {}
        risks = tuple(self.risks[i] for i in kept) if self.risks else ()
        return PairSet([self.pairs[i] for i in kept], self.counts | {"kept": len(kept)} | dropped, risks)

    @classmethod
    def read(cls, pairs: Path, counts: Path) -> PairSet:
        """The set whose pairs and counts were written to these files."""
        return cls(load_pairs(pairs), read_json(counts))


def joined(sets: Mapping[str, PairSet]) -> PairSet:
    """The pairs of several risks as one set; what was counted is told apart by their names."""
    pairs = [pair for one in sets.values() for pair in one.pairs]
    counts = {f"{name}: {what}": n for name, one in sets.items() for what, n in one.counts.items()}
    counts |= {what: sum(one.counts.get(what, 0) for one in sets.values()) for what in ("prompts", "kept")}
    return PairSet(pairs, counts, tuple(i for i, one in enumerate(sets.values()) for _ in one.pairs))


class Teacher(Protocol):
    """A source of pairs."""

    name: str
    has_likelihood: bool
    """Whether the teacher can be DPO's reference: whether it assigns log-probabilities of its own."""
    filter_judges: tuple[str, ...]
    """Judges that decided which pairs count; the scorecard marks them."""

    def identity(self) -> dict[str, Any]:
        """The settings that the pairs depend on, for the cache key."""
        ...

    def check(self, form: Form) -> None:
        """Refuse prompts of a form that it cannot respond to, before anything is loaded."""
        ...

    def pairs(self, context: TeacherContext) -> PairSet:
        """Make or read the pairs."""
        ...

    def arm(self, name: str) -> Arm:
        """The teacher as one side of a comparison. Raises PolicyPatchError where it answers no prompts."""
        ...

    def likelihood(self, context: TeacherContext, pairs: Sequence[Pair], items: Sequence[Item]) -> Tensor:
        """Summed log-probabilities of chosen and rejected under the teacher: (pairs, 2), NaN where there is none.

        Args:
            context: as for the pairs.
            pairs: the pairs.
            items: the same in the base's tokens, cut to what is trained on.
        """
        ...
