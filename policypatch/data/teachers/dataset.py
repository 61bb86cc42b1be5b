"""Teacher `dataset`: ready (prompt, chosen, rejected) rows, from JSONL or a set of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from policypatch.data.pairs import BARE, Pair, parse_pair
from policypatch.data.teachers.teacher import PairSet, TeacherContext
from policypatch.errors import Number, PolicyPatchError
from policypatch.files.atomic import read_jsonl
from policypatch.files.sources import Source, fetch_all, identity
from policypatch.model.arm import Arm
from policypatch.model.form import Form
from policypatch.model.tree import Item

FIELDS = ("prompt", "chosen", "rejected")


class DatasetTeacher:
    """Rows as they are.

    Args:
        source: a JSONL file (path, wheel or hub), or a hub data set's parquet/JSON files.
        fields: which fields of a row are prompt, chosen and rejected, where they are named otherwise.
        limit: rows at most; None takes all.
    """

    name = "dataset"
    has_likelihood = False
    filter_judges: tuple[str, ...] = ()

    def __init__(
        self, source: Source, fields: Mapping[str, str] | None = None, limit: int | None = None, name: str = name
    ):
        if source is None:
            raise PolicyPatchError("teacher.source is not set: name a JSONL file with prompt, chosen and rejected")
        Number(least=1, whole=True, null=True).check("teacher.limit", limit)
        if unknown := set(fields or {}) - set(FIELDS):
            raise PolicyPatchError(f"teacher.fields has {sorted(unknown)[0]!r}: it renames {', '.join(FIELDS)}")
        self.source, self.fields, self.limit = source, dict(fields or {}), limit

    def identity(self) -> dict[str, Any]:
        """The rows' own digest and how they are read."""
        known = identity(self.source, "teacher.source")
        return {"teacher": self.name, "source": known, "fields": self.fields, "limit": self.limit}

    def check(self, form: Form) -> None:
        """Nothing to refuse: rows say themselves what they are."""

    def arm(self, name: str) -> Arm:
        """Refused: rows answer no prompt but their own."""
        raise PolicyPatchError(f"teacher {self.name} holds ready rows and cannot be asked: choose another method")

    def likelihood(self, context: TeacherContext, pairs: Sequence[Pair], items: Sequence[Item]) -> Tensor:
        """Refused: rows have no likelihood."""
        raise PolicyPatchError(f"teacher {self.name} has no log-probabilities: use dpo.reference=sft or base")

    def pairs(self, context: TeacherContext) -> PairSet:
        """Read and check every row."""
        pairs = [pair for path in fetch_all(self.source, "teacher.source") for pair in self._read(path)]
        pairs = pairs[: self.limit]
        if not pairs:
            raise PolicyPatchError("teacher.source holds no rows: give at least one pair")
        return PairSet(pairs, {"rows": len(pairs), "kept": len(pairs)})

    def _read(self, path: Path) -> list[Pair]:
        names = {field: self.fields.get(field, field) for field in FIELDS}
        rows = read_jsonl(path) if path.suffix == ".jsonl" else _read_table(path)
        return [self._pair(row, names, f"{path}, row {number}") for number, row in enumerate(rows, 1)]

    def _pair(self, row: Mapping[str, Any], names: Mapping[str, str], where: str) -> Pair:
        bare = row.get("benign") or row.get("kind") in BARE
        needed = [name for field, name in names.items() if not (field == "rejected" and bare)]
        if missing := [name for name in needed if name not in row]:
            raise PolicyPatchError(f"{where} has no field {missing[0]!r}: set teacher.fields to its own names")
        return parse_pair({**row, **{field: row.get(name) for field, name in names.items()}}, where)


def _read_table(path: Path) -> Iterable[dict[str, Any]]:
    """Rows of a file that the datasets library reads."""
    import datasets

    kind = {".json": "json", ".parquet": "parquet", ".csv": "csv"}.get(path.suffix)
    if kind is None:
        raise PolicyPatchError(f"teacher.source: {path.name} is not .jsonl, .json, .parquet or .csv")
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise PolicyPatchError(f"teacher.source: {path} cannot be read as {kind} ({error})") from error
