"""Prompts of a risk, read from a source: which of its texts, and which part of each."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from policypatch.data.near import near_duplicates, normalise
from policypatch.data.texts import placed
from policypatch.data.texts import read_rows as rows_of_file
from policypatch.errors import Number, PolicyPatchError
from policypatch.files.sources import Source, fetch_all

log = logging.getLogger(__name__)

__all__ = ["PromptSet", "near_duplicates", "normalise", "read_rows"]


@dataclass(frozen=True)
class PromptSet:
    """Where prompts come from and which part of a text is the prompt.

    Attributes:
        source: see `policypatch.files.sources`; how its files are read, by their suffix, says `policypatch.data.texts`.
        field: the field of a row, or column of a table, that holds the text.
        where: only rows whose fields have these values.
        remove: regular expression; what it matches is removed from every text.
        before: regular expression; the prompt is what stands before its first match, and a text without one is none.
        portion: only texts whose digest lies in this part of all digests, [from, to) of [0, 1]; sets with portions
            that do not overlap share no text.
        take: "all" of that, or its "first_half" (in words, rounded down, at least one).
        rephrase: a regular expression (`pattern`) and what its first match becomes (`into`, with `\\1` for its first
            group and so on); a prompt without a match stays as it is.
        limit: how many prompts at most, drawn without replacement by `seed`; None takes all.
        seed: of that draw.

    Raises:
        PolicyPatchError: a value that cannot be used.
    """

    source: Source
    field: str = "text"
    where: Mapping[str, Any] | None = None
    remove: str | None = None
    before: str | None = None
    portion: Sequence[float] | None = None
    take: str = "all"
    rephrase: Mapping[str, str] | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse bad values where they live, whoever gives them."""
        if self.take not in ("all", "first_half"):
            raise PolicyPatchError(f"take is {self.take!r}: choose all or first_half")
        Number(least=1, whole=True, null=True).check("limit", self.limit)
        for name in ("remove", "before"):
            _check_expression(name, getattr(self, name))
        if self.rephrase is not None:
            _check_rephrase(self.rephrase)
        if self.portion is not None and not _is_portion(self.portion):
            raise PolicyPatchError(f"portion is {self.portion!r}: give two numbers in [0, 1], the smaller one first")
        if self.where is not None and not (
            isinstance(self.where, Mapping) and all(isinstance(v, str | int | float) for v in self.where.values())
        ):
            raise PolicyPatchError(f"where is {self.where!r}: give one value for each field, e.g. {{kind: safe}}")

    def load(
        self, key: str, without: Collection[str] = (), near: float | None = None, begun: bool = False
    ) -> list[str]:
        """The prompts, distinct, in the order of the source.

        Args:
            key: the config key named in errors.
            without: full texts to leave out (those of the evaluation set), compared by `normalise`.
            near: also leave out what is at least this similar to one of them (`near_duplicates`); None does not.
            begun: also leave out what begins with one of them, as a sentence does whose beginning is measured on.

        Raises:
            PolicyPatchError: a file or row that cannot be read, or no prompt left.
        """
        texts = self.all_texts(key)
        banned = {normalise(text) for text in without}
        made = [self._prompt(text) for text in texts]
        alike = set() if near is None else near_duplicates(texts, list(without), near)
        if near is not None and self.rephrase is not None:  # what is a question now may be nearer than the order was
            alike |= near_duplicates(made, list(without), near)
        if begun:
            alike |= {i for i, text in enumerate(texts) if begins_with_one(normalise(text), banned)}
        if alike:
            log.info(
                "%s: %d of %d texts are left out, as they are much like what is measured on",
                key,
                len(alike),
                len(texts),
            )
        kept = [i for i, text in enumerate(texts) if i not in alike and normalise(text) not in banned]
        prompts = [made[i] for i in kept]
        distinct = [p for p in dict.fromkeys(prompts) if p and normalise(p) not in banned]
        if not distinct:
            raise PolicyPatchError(f"{key} has no prompts: {self._why_none(len(texts))}")
        if self.limit is None or self.limit >= len(distinct):
            if self.limit is not None and len(distinct) < min(self.limit, len(texts)):
                log.warning("%s: %d are left where %d were asked for", key, len(distinct), self.limit)
            return distinct
        drawn = sorted(Random(self.seed).sample(range(len(distinct)), self.limit))
        return [distinct[i] for i in drawn]

    def all_texts(self, key: str) -> list[str]:
        """Every text of the set in full, one for each row chosen: before `before`, `take` and `limit`."""
        texts = [text for text, _ in read_rows(self.source, f"{key}.source", self.field, self.where)]
        if self.portion is not None:
            low, high = self.portion
            texts = [text for text in texts if low <= _place(text) < high]
        return [self._cleaned(text) for text in texts]

    def place_of(self, prompt: str) -> str | None:
        """The file and row that a prompt, or a text in full, comes from; None where it is from none of them."""
        for path in fetch_all(self.source, "source"):
            for place, text, _ in placed(path, self.field, self.where):
                if prompt in (cleaned := self._cleaned(text), self._prompt(cleaned)):
                    return place
        return None

    def _cleaned(self, text: str) -> str:
        """A text without what `remove` matches."""
        return text if self.remove is None else re.sub(self.remove, "", text).strip()

    def _prompt(self, text: str) -> str:
        """The part of a text that is the prompt, rephrased; empty where there is none."""
        if self.before is not None:
            cut = re.search(self.before, text)
            text = text[: cut.start()].strip() if cut else ""
        if self.take == "first_half":
            words = text.split()
            text = " ".join(words[: max(1, len(words) // 2)])
        return text if self.rephrase is None else re.sub(self.rephrase["pattern"], self.rephrase["into"], text, count=1)

    def _why_none(self, texts: int) -> str:
        if not texts and self.portion is not None:
            return f"no text of its source lies in portion {list(self.portion)}"
        if not texts:
            return f"no row has {dict(self.where)}" if self.where else "its source is empty"
        if self.before is not None:
            return f"in no text of its source that is not in the evaluation set does {self.before!r} match (before)"
        return "its source is empty or stands in the evaluation set"


def read_rows(
    source: Source, key: str, field: str = "text", where: Mapping[str, Any] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Every text of a source's files with the row it stands in (empty where the files hold no rows).

    Raises:
        PolicyPatchError: as `policypatch.data.texts.read_rows`, and for a source that cannot be had, naming `key`.
    """
    paths = fetch_all(source, key)
    try:
        return [found for path in paths for found in rows_of_file(path, field, where)]
    except PolicyPatchError as error:
        raise PolicyPatchError(f"{key}: {error}") from error


def begins_with_one(text: str, beginnings: Collection[str]) -> bool:
    """Whether a text begins with one of these, all of them normalised."""
    words = text.split()
    return any(" ".join(words[:n]) in beginnings for n in range(1, len(words) + 1))


def _place(text: str) -> float:
    """Where a text stands among all texts, in [0, 1), whatever its case and punctuation."""
    digest = hashlib.blake2b(normalise(text).encode(), digest_size=6).digest()  # 48 bits: exact as a float
    return int.from_bytes(digest, "big") / 2**48


def _is_portion(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return False
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        return False
    return bool(0 <= value[0] < value[1] <= 1)


def _check_expression(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise PolicyPatchError(f"{name} is {value!r}: give a regular expression or null")
    try:
        re.compile(value)
    except re.error as error:
        raise PolicyPatchError(f"{name} is {value!r}: it is no regular expression ({error})") from error


def _check_rephrase(value: object) -> None:
    if not isinstance(value, Mapping) or set(value) != {"pattern", "into"} or not isinstance(value["into"], str):
        raise PolicyPatchError(f"rephrase is {value!r}: give a pattern and what it becomes (into), or null")
    _check_expression("rephrase.pattern", value["pattern"])
    try:
        re.sub(value["pattern"], value["into"], "")
    except (re.error, IndexError) as error:
        raise PolicyPatchError(f"rephrase.into is {value['into']!r}: it does not fit the pattern ({error})") from error
