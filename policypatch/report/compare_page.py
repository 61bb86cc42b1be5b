"""The comparison as one self-contained page: it needs no network, and its only script sorts the tables."""

from __future__ import annotations

import base64
import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from policypatch.report.compare import Column, Comparison, Line, cell_text, heading, short, value_text
from policypatch.report.compare_figures import panels
from policypatch.report.metrics import METRICS
from policypatch.report.page import TEMPLATES, render
from policypatch.report.scorecard import LEVEL, effect_of


def page(found: Comparison, out: Path) -> str:
    """The page, for the folder `out`, which it links to the runs' own reports from."""
    script = (TEMPLATES / "compare.js").read_text("utf-8").strip()
    seedless = [key for key in found.keys if key != "seed"]
    tables = [("Each run", found.keys, found.lines, "Each run with its 95 % interval over prompts.")]
    if found.over_seeds:
        note = "Means over the seeds; in brackets the lowest and the highest."
        tables.insert(0, ("Over seeds", seedless, [*found.bases, *found.over_seeds], note))
    functions = {"cell_text": cell_text, "effect": _effect, "sort_value": _sort_value}
    return render(
        "compare.html",
        {"value_text": value_text, "short": short, "heading": heading},
        functions | {"report_of": partial(_report_of, out.resolve())},
        title=f"Comparison: {out.resolve().name}",
        found=found,
        tables=[t for t in tables if t[2]],
        panels=panels(found),
        commands=sorted({str(record.run.get("command")) for record in found.records if record.run.get("command")}),
        versions=next((record.run.get("versions") for record in found.records if record.run.get("versions")), {}),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _report_of(out: Path, line: Line) -> str:
    """Where the run's report is, as a link."""
    path = None if line.record is None else line.record.folder.resolve() / "report.html"
    if path is None or not path.is_file():
        return ""
    return quote(Path(os.path.relpath(path, out)).as_posix())


def _effect(line: Line, column: Column) -> str:
    """Whether the cell is better or worse than the base by the evidence of its own run; nothing for several runs."""
    row = line.cells.get(column)
    if row is None or line.record is None or column.metric not in METRICS:
        return ""
    base = next((r for r in line.record.rows if r["arm"] == "base" and Column.of(r) == column), None)
    effect = effect_of(row, base, line.record.settings.get("evaluate.level") or LEVEL)
    return effect if effect in ("better", "worse") else ""


def _sort_value(value: Any) -> str:
    """What a cell is sorted by; the empty string stands last."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return repr(float(value))
