"""Prompts of a risk, read from a source: one a line of a text file, or a field of JSONL rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from policypatch.errors import Number, PolicyPatchError
from policypatch.files.atomic import read_jsonl
from policypatch.files.sources import Source, fetch_all


@dataclass(frozen=True)
class PromptSet:
    """Where prompts come from and which part of a text is the prompt.

    Attributes:
        source: see `policypatch.files.sources`; `.jsonl` files hold rows, all others one prompt a line.
        field: the field of a row that holds the text.
        take: "all" of the text, or its "first_half" (in words, rounded down, at least one).
        limit: how many prompts at most, drawn without replacement by `seed`; None takes all.
        seed: of that draw.

    Raises:
        PolicyPatchError: a `take` or `limit` that there is not.
    """

    source: Source
    field: str = "text"
    take: str = "all"
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse bad values where they live, whoever gives them."""
        if self.take not in ("all", "first_half"):
            raise PolicyPatchError(f"take is {self.take!r}: choose all or first_half")
        Number(least=1, whole=True, null=True).check("limit", self.limit)

    def load(self, key: str, without: Collection[str] = ()) -> list[str]:
        """The prompts, distinct, in the order of the source.

        Args:
            key: the config key named in errors.
            without: full texts to leave out (those of the evaluation set), compared by `normalise`.

        Raises:
            PolicyPatchError: a file or row that cannot be read, or no prompt left.
        """
        texts = self.all_texts(key)
        banned = {normalise(text) for text in without}
        prompts = [self._prompt(text) for text in texts if normalise(text) not in banned]
        distinct = [p for p in dict.fromkeys(prompts) if normalise(p) not in banned]
        if not distinct:
            raise PolicyPatchError(f"{key} has no prompts: its source is empty or stands in the evaluation set")
        if self.limit is None or self.limit >= len(distinct):
            return distinct
        kept = sorted(Random(self.seed).sample(range(len(distinct)), self.limit))
        return [distinct[i] for i in kept]

    def all_texts(self, key: str) -> list[str]:
        """Every text of the source in full, before `take` and `limit`."""
        return [text for path in fetch_all(self.source, f"{key}.source") for text in _texts(path, self.field)]

    def _prompt(self, text: str) -> str:
        if self.take == "all":
            return text
        words = text.split()
        return " ".join(words[: max(1, len(words) // 2)])


def normalise(text: str) -> str:
    """What two spellings of one text have in common: letters, digits and single spaces, in lower case."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _texts(path: Path, field: str) -> list[str]:
    if path.suffix == ".jsonl":
        return [_field(row, field, f"{path}, row {number}") for number, row in enumerate(read_jsonl(path), 1)]
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # not splitlines, which also cuts at U+2028 and its like
    except UnicodeDecodeError as error:
        raise PolicyPatchError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise PolicyPatchError(f"cannot read {path}: {error.strerror or error}") from error
    return [line.strip() for line in lines if line.strip()]


def _field(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise PolicyPatchError(f"{where} has no text in field {field!r}: name the right field or remove the row")
    return value.strip()
