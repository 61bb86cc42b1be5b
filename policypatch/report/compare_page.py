"""The comparison as one self-contained page: it needs no network, and its only script sorts the tables."""

from __future__ import annotations

import base64
import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from policypatch.report.compare import Comparison, Line, cell_text, heading, short, value_text
from policypatch.report.compare_figures import panels
from policypatch.report.drawing import arm_styles
from policypatch.report.metrics import METRICS
from policypatch.report.scorecard import LEVEL, effect_of

TEMPLATES = Path(__file__).parent / "templates"


def page(found: Comparison, out: Path) -> str:
    """The page, for the folder `out`, which it links to the runs' own reports from."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"cell_text": cell_text, "effect": _effect, "sort_value": _sort_value}
    environment.globals["report_of"] = partial(_report_of, out.resolve())
    environment.filters |= {"value_text": value_text, "short": short, "heading": heading}
    script = (TEMPLATES / "compare.js").read_text("utf-8").strip()
    seedless = [key for key in found.keys if key != "seed"]
    tables = [("Each run", found.keys, found.lines, "Each run with its 95 % interval over prompts.")]
    if found.over_seeds:
        note = "Means over the seeds; in brackets the lowest and the highest."
        bases = [line for line in found.lines if line.record is None]
        tables.insert(0, ("Over seeds", seedless, [*bases, *found.over_seeds], note))
    html = environment.get_template("compare.html").render(
        title=f"Comparison: {out.resolve().name}",
        found=found,
        tables=[t for t in tables if t[2]],
        panels=panels(found),
        styles=arm_styles(dict.fromkeys(line.arm for line in found.lines)),
        commands=sorted({str(record.run.get("command")) for record in found.records if record.run.get("command")}),
        versions=next((record.run.get("versions") for record in found.records if record.run.get("versions")), {}),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def _report_of(out: Path, line: Line) -> str:
    """Where the run's report is, as a link."""
    path = None if line.record is None else line.record.folder.resolve() / "report.html"
    if path is None or not path.is_file():
        return ""
    return quote(Path(os.path.relpath(path, out)).as_posix())


def _effect(found: Comparison, line: Any, column: Any) -> str:
    """Whether the cell is better or worse than the base by the evidence of its own run; nothing for several runs."""
    row = line.cells.get(column)
    if row is None or line.record is None or column.metric not in METRICS:
        return ""
    base = next((r for r in line.record.rows if r["arm"] == "base" and _same(r, row)), None)
    effect = effect_of(row, base, line.record.settings.get("evaluate.level") or LEVEL)
    return effect if effect in ("better", "worse") else ""


def _same(a: Any, b: Any) -> bool:
    return all(a.get(key) == b.get(key) for key in ("risk", "split", "metric", "judge"))


def _sort_value(value: Any) -> str:
    """What a cell is sorted by; the empty string stands last."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return repr(float(value))
