"""Preference pairs: (prompt, chosen, rejected), and the rule that decides which candidates make one.

A pair is what both stages learn from: SFT takes its chosen side, DPO both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policypatch.errors import Number, PolicyPatchError
from policypatch.files.atomic import read_jsonl, write_jsonl
from policypatch.model.form import CHAT, PLAIN, Form


@dataclass(frozen=True)
class Text:
    """A completion: its text, the tokens it was drawn as (None: tokenise the text), and whether it ended itself."""

    text: str
    tokens: tuple[int, ...] | None = None
    ended: bool = False


ROWS = 2
"""Goes up when the same settings make other rows than before, so that those in caches are not taken for them."""

KINDS = ("pair", "benign", "text", "balanced")
IN_BATCH = ("pair", "benign")  # kinds that a batch is made of; the others stand beside it
BARE = ("benign", "text")  # kinds that may do without a rejected side


@dataclass(frozen=True)
class Pair:
    """One training row. Most are pairs of the risk; the other kinds keep a patch from doing more than it should.

    | kind | chosen | rejected |
    |---|---|---|
    | pair | the response to learn | the response to move away from |
    | benign | the base's own response, which is right | the teacher's refusal, or None |
    | text | the base's own continuation of a text that has nothing to do with the risk | None |
    | balanced | a continuation | one that should be just as likely: neither is better |

    Attributes:
        prompt: a text to continue, or a request.
        chosen, rejected: see above.
        chosen_score, rejected_score: the filter judge's, None where no judge was asked.
        chat: whether the prompt is a request in the base's chat template.
        kind: see above.
    """

    prompt: str
    chosen: Text
    rejected: Text | None
    chosen_score: float | None = None
    rejected_score: float | None = None
    chat: bool = False
    kind: str = "pair"

    @property
    def form(self) -> Form:
        """What stands around the prompt."""
        return CHAT if self.chat else PLAIN


@dataclass(frozen=True)
class PairFilter:
    """When the safest and the most toxic of n candidates count as a pair (arXiv 2511.08484, Eqs. 4-5).

    Attributes:
        margin: least difference of the two scores (Eq. 4).
        chosen_at_most: the chosen side's score must not exceed this (Eq. 5: good enough in absolute terms).
        rejected_at_least: the rejected side's score must reach this.
        min_tokens: shorter candidates are neither chosen nor rejected, and empty ones never are (before any is cut).
        max_repetition: a candidate with a larger share of repeated trigrams is not chosen.
        per_prompt: at most this many pairs of one prompt, each candidate used once.
        hard_negatives: whether a teacher's own risky candidates are rejected sides, too, of as many pairs again: they
            lie between what is learnt and what the base does, where neither of the two says which way is right.
        cut_rejected: whether a rejected side of the base's own tokens ends where the judges first find it unsafe
            (`policypatch.data.cut`); its score stays the whole one's.

    Raises:
        PolicyPatchError: a field that no filter could use.
    """

    margin: float = 0.3
    chosen_at_most: float = 0.2
    rejected_at_least: float = 0.5
    min_tokens: int = 5
    max_repetition: float = 0.1
    per_prompt: int = 1
    hard_negatives: bool = False
    cut_rejected: bool = False

    def __post_init__(self) -> None:
        """Refuse bad values where they live, whoever gives them."""
        for field in ("margin", "chosen_at_most", "rejected_at_least", "max_repetition"):
            Number(least=0, most=1).check(field, getattr(self, field))
        Number(least=0, whole=True).check("min_tokens", self.min_tokens)
        Number(least=1, whole=True).check("per_prompt", self.per_prompt)


@dataclass(frozen=True)
class Candidates:
    """What one side of a prompt's pairs is chosen from.

    Attributes:
        scores: (judges, n) risk of each candidate by each judge, 0 safe to 1 unsafe.
        lengths: (n,) tokens of each candidate.
        repetition: (n,) share of repeated trigrams of each candidate.
    """

    scores: np.ndarray
    lengths: np.ndarray
    repetition: np.ndarray


def choose_pairs(chosen: Candidates, rejected: Candidates, rule: PairFilter) -> list[tuple[int, int]]:
    """The (chosen, rejected) candidate numbers of one prompt, best pair first.

    With several judges the chosen side must be safe by all of them and the rejected side unsafe by all: the first is
    held to its highest score, the second to its lowest.

    Args:
        chosen: the teacher's candidates.
        rejected: the base's; the same object where the base is its own teacher.
        rule: the thresholds.
    """
    highest, lowest = chosen.scores.max(0), rejected.scores.min(0)  # NaN where a judge failed: on neither side
    shortest = max(1, rule.min_tokens)
    fit = (chosen.lengths >= shortest) & (highest <= rule.chosen_at_most) & (chosen.repetition <= rule.max_repetition)
    unfit = (rejected.lengths >= shortest) & (lowest >= rule.rejected_at_least)
    best = [i for i in np.argsort(highest, kind="stable") if fit[i]][: rule.per_prompt]
    worst = [i for i in np.argsort(-lowest, kind="stable") if unfit[i]][: rule.per_prompt]
    pairs = zip(best, worst, strict=False)
    same = chosen is rejected
    return [(int(c), int(r)) for c, r in pairs if lowest[r] - highest[c] >= rule.margin and not (same and c == r)]


def save_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSONL."""
    write_jsonl(path, [asdict(pair) for pair in pairs])


def load_pairs(path: Path) -> list[Pair]:
    """Read what `save_pairs` wrote, or a user's own rows.

    A row holds `prompt`, `chosen` and `rejected`. The last two are strings, which are complete responses (their end
    is learnt, too), or objects of `Text`'s fields, where `"ended": false` marks a text that was cut off. A row with
    `"kind": "benign"` (or `"benign": true`) may do without rejected; `"chat": true` marks a prompt that is a request.

    Raises:
        PolicyPatchError: naming the file and the row that lacks a field or holds an empty or wrong one.
    """
    return [parse_pair(row, f"{path}, row {number}") for number, row in enumerate(read_jsonl(path), 1)]


def parse_pair(row: dict[str, Any], where: str) -> Pair:
    """One row as a Pair; `where` is named in the error."""
    benign, chat = _flag(row, "benign", where), _flag(row, "chat", where)
    kind = row.get("kind") or ("benign" if benign else "pair")
    if kind not in KINDS:
        raise PolicyPatchError(f"{where}: kind is {kind!r}: choose {', '.join(KINDS)}, or leave it out")
    bare = kind in BARE and row.get("rejected") is None
    for field in ("prompt", "chosen") if bare else ("prompt", "chosen", "rejected"):
        if field not in row:
            raise PolicyPatchError(f"{where} has no field {field!r}: a pair needs prompt, chosen and rejected")
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise PolicyPatchError(f"{where} has an empty prompt: give it text or remove the row")
    return Pair(
        prompt=row["prompt"],
        chosen=_parse_text(row["chosen"], f"{where}, field chosen"),
        rejected=None if bare else _parse_text(row["rejected"], f"{where}, field rejected"),
        chosen_score=row.get("chosen_score"),
        rejected_score=row.get("rejected_score"),
        chat=chat,
        kind=kind,
    )


def _flag(row: dict[str, Any], field: str, where: str) -> bool:
    value = row.get(field)
    if value is not None and not isinstance(value, bool):
        raise PolicyPatchError(f"{where}: {field} must be true or false, or left out")
    return bool(value)


def _parse_text(value: object, where: str) -> Text:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not value["text"].strip():
        raise PolicyPatchError(f"{where} is empty or not text: give a non-empty string")
    tokens = value.get("tokens")
    if tokens is not None and not (
        isinstance(tokens, list) and tokens and all(type(t) is int and t >= 0 for t in tokens)
    ):
        raise PolicyPatchError(f"{where}: tokens must be a list of token ids, or left out")
    ended = True if value.get("ended") is None else value["ended"]
    if not isinstance(ended, bool):
        raise PolicyPatchError(f"{where}: ended must be true or false, or left out")
    return Text(value["text"], None if tokens is None else tuple(tokens), ended)
