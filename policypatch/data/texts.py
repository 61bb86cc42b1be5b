"""The texts of one file, read by its suffix: rows with a field, YAML seeds, nested JSON, or one text a line.

Nothing is stripped of what a text says, only of white space around it. A mistake is told by file and row, rows counted
from 1 (in a table the header is row 1).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import numbered_jsonl, read_json


class _Tabs(csv.excel_tab):
    """Without quoting: a quotation mark at the start of a text would swallow the rows up to the next one."""

    quoting = csv.QUOTE_NONE


TABLES = {".csv": csv.excel, ".tsv": _Tabs}
WITH_ROWS = (".jsonl", ".parquet", *TABLES)


def read_rows(
    path: Path, field: str = "text", where: Mapping[str, Any] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Every text of a file, in its order, and the row it stands in (empty in a file without rows).

    Args:
        path: `.jsonl`, `.parquet`: `field` of each row. `.csv`, `.tsv`: column `field` (a first line that starts
            with # is skipped; a TSV knows no quoting). `.prompt`, `.yaml`, `.yml`: a list of texts or of `value: text`,
            or such a list under `seeds` (PyRIT). `.json`: `field` of each object of a list; else every string at the
            leaves (BOLD). All others: one text a line.
        field: see `path`.
        where: only rows whose fields have these values, compared as text.

    Raises:
        PolicyPatchError: a file or row that cannot be read, a row without text, or `where` for a file without rows.
    """
    return [(text, row) for _, text, row in placed(path, field, where)]


def placed(
    path: Path, field: str = "text", where: Mapping[str, Any] | None = None
) -> list[tuple[str, str, dict[str, Any]]]:
    """The same, and before each in words where it stands."""
    suffix = path.suffix.lower()
    if suffix in WITH_ROWS:
        return _chosen(path, _table(path, TABLES[suffix]) if suffix in TABLES else _rows(path, suffix), field, where)
    if suffix == ".json" and _is_rows(content := read_json(path)):
        return _chosen(path, enumerate(content, 1), field, where)
    if where:
        raise PolicyPatchError(f"{path} has no rows to choose from: leave out where, or give {', '.join(WITH_ROWS)}")
    texts: list[tuple[str, str, dict[str, Any]]] = [
        (f"{path}, row {number}", text.strip(), {})
        for number, text in enumerate(_plain_texts(path, suffix), 1)
        if text.strip()
    ]
    if not texts:
        raise PolicyPatchError(f"{path} is empty: expected texts")
    return texts


def _chosen(
    path: Path, rows: Iterable[tuple[int, dict[str, Any]]], field: str, where: Mapping[str, Any] | None
) -> list[tuple[str, str, dict[str, Any]]]:
    kept = ((f"{path}, row {number}", row) for number, row in rows)
    return [(place, _text(row, field, place), row) for place, row in kept if _fits(row, where or {}, place)]


def _is_rows(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(item, dict) for item in content)


def _rows(path: Path, suffix: str) -> Iterable[tuple[int, dict[str, Any]]]:
    if suffix == ".jsonl":
        return numbered_jsonl(path)
    from pyarrow import ArrowException, parquet  # here, as it takes a while to import

    try:
        return enumerate(parquet.read_table(path).to_pylist(), 1)
    except (OSError, ArrowException) as error:
        raise PolicyPatchError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from error


def _plain_texts(path: Path, suffix: str) -> Iterable[str]:
    if suffix in (".prompt", ".yaml", ".yml"):
        return _seeds(path)
    if suffix == ".json":
        return _leaves(read_json(path))
    return _content(path).split("\n")  # not splitlines, which also cuts at U+2028 and its like


def _content(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        row = error.object[: error.start].count(b"\n") + 1
        raise PolicyPatchError(f"{path}, row {row}: not UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise PolicyPatchError(f"cannot read {path}: {error.strerror or error}") from error


def _table(path: Path, dialect: type[csv.Dialect]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, its columns by name), the header not among them. A quoted text may span lines; it is one row."""
    content = _content(path)
    if content.startswith("#"):
        content = content.partition("\n")[2]
    rows = csv.reader(io.StringIO(content, newline=""), dialect, strict=True)
    header: list[str] = []
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            if number == 1:
                header = row
            elif any(cell.strip() for cell in row):
                if len(row) != len(header):
                    raise PolicyPatchError(
                        f"{path}, row {number}: it has {len(row)} columns and the header {len(header)}: quote its text"
                    )
                yield number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise PolicyPatchError(f"{path}, row {number + 1}: {error}") from error
    if number <= 1:
        raise PolicyPatchError(f"{path} is empty: expected a header and one text a row")


def _fits(row: Mapping[str, Any], where: Mapping[str, Any], place: str) -> bool:
    for name in where:
        if name not in row:
            raise PolicyPatchError(f"{place} has no field {name!r} to choose by: where can name {', '.join(row)}")
    return all(str(row[name]) == str(value) for name, value in where.items())


def _text(row: Mapping[str, Any], field: str, place: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise PolicyPatchError(f"{place} has no text in field {field!r}: name the right field or remove the row")
    return value.strip()


def _seeds(path: Path) -> list[str]:
    try:
        # libyaml's parser, where it was built in, is ten times as fast.
        document = yaml.load(_content(path), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise PolicyPatchError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    items = document.get("seeds") if isinstance(document, dict) else document
    if not isinstance(items, list) or not items:
        raise PolicyPatchError(f"{path} holds no texts: give a list of them, or one under seeds")
    rows = [item if isinstance(item, dict) else {"value": item} for item in items]
    return [_text(row, "value", f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _leaves(value: Any) -> Iterator[str]:
    """Every string in nested mappings and lists; numbers and the like are no texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
