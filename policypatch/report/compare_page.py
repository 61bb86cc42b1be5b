"""The comparison as one self-contained page: it needs no network, and its only script sorts the tables."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from policypatch.report.compare_lines import Column, Comparison, Line
from policypatch.report.compare_text import RIVALS, cell_text, heading, short, tables, value_text
from policypatch.report.drawing import Panel
from policypatch.report.metrics import METRICS
from policypatch.report.page import TEMPLATES, render
from policypatch.report.scorecard import LEVEL, effect_of


def page(found: Comparison, rivals: Sequence[Sequence[str]], panels: Sequence[Panel], out: Path) -> str:
    """The page, for the folder `out`, which it links to the runs' own reports from.

    Args:
        found: what is compared.
        rivals: see `against_patch`.
        panels: its figures.
        out: the folder.
    """
    script = (TEMPLATES / "compare.js").read_text("utf-8").strip()
    functions = {"cell_text": cell_text, "effect": _effect, "sort_value": _sort_value}
    return render(
        "compare.html",
        {"value_text": value_text, "short": short, "heading": heading, "first_number": _first_number},
        functions | {"report_of": partial(_report_of, out.resolve())},
        title=f"Comparison: {out.resolve().name}",
        found=found,
        tables=[table for table in tables(found) if table.lines],
        rivals=rivals,
        rivals_note=RIVALS,
        panels=panels,
        commands=sorted({str(record.run.get("command")) for record in found.records if record.run.get("command")}),
        versions=next((record.run.get("versions") for record in found.records if record.run.get("versions")), {}),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _report_of(out: Path, line: Line) -> str:
    """Where the run's report is, as a link."""
    path = line.records[0].folder.resolve() / "report.html" if len(line.records) == 1 else None
    if path is None or not path.is_file():
        return ""
    return quote(Path(os.path.relpath(path, out)).as_posix())


def _effect(line: Line, column: Column) -> str:
    """Whether the cell is better or worse than the base by the evidence of its own run; nothing for several runs."""
    row = line.cells.get(column)
    if row is None or len(line.records) != 1 or column.metric not in METRICS:
        return ""
    (record,) = line.records
    base = next((r for r in record.rows if r["arm"] == "base" and Column.of(r) == column), None)
    effect = effect_of(row, base, record.settings.get("evaluate.level") or LEVEL)
    return effect if effect in ("better", "worse") else ""


def _first_number(cell: str) -> str:
    """What a cell of words is sorted by; the empty string stands last."""
    found = re.search(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", cell)
    return found.group() if found else ""


def _sort_value(value: Any) -> str:
    """What a cell is sorted by; the empty string stands last."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return repr(float(value))
