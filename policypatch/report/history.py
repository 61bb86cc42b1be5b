"""What audits found over time: a file with a line for each, and its figures drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
from filelock import FileLock
from matplotlib.dates import DateFormatter
from matplotlib.figure import Figure

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.drift import Place, place_of
from policypatch.files.atomic import atomic_path, numbered_jsonl, write_jsonl
from policypatch.report.drawing import arm_styles
from policypatch.report.metrics import is_risk, metric_label
from policypatch.report.scorecard import readable

PANELS = 12  # more would be none that anybody looks at
NEEDED = ("when", "patch", "rows")


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a history, oldest first; none where there is no file.

    Raises:
        PolicyPatchError: naming the row that is no entry.
    """
    if not path.exists():
        return []
    entries = numbered_jsonl(path)
    for number, entry in entries:
        if missing := [key for key in NEEDED if key not in entry]:
            raise PolicyPatchError(f"{path}, row {number}: no audit's entry, it has no {missing[0]}")
    return [entry for _, entry in entries]


def append(path: Path, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add an entry, and draw what the file then holds of its patch into a .svg beside it; gives all entries.

    Of several audits that end at once each waits for the one before it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        entries = [*read(path), dict(entry)]
        write_jsonl(path, entries)
        draw([one for one in entries if one["patch"] == entry["patch"]], path.with_suffix(".svg"))
    return entries


def draw(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each figure of a risk: the patch and the base over time, with their intervals."""
    places = list(dict.fromkeys(place_of(row) for entry in entries for row in entry["rows"] if is_risk(row["metric"])))
    shown = places[:PANELS]
    columns = min(3, max(1, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "history", "font.size": 9}):
        figure = Figure(figsize=(3.6 * columns, 2.4 * lines), layout="constrained")
        for number, place in enumerate(shown):
            _panel(figure.add_subplot(lines, columns, number + 1), place, entries)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _panel(axes: Any, place: Place, entries: Sequence[Mapping[str, Any]]) -> None:
    risk, split, metric, judge = place
    for (arm, style), mark in zip(arm_styles(("base", "patch")).items(), "so", strict=True):
        found = [
            (datetime.fromisoformat(entry["when"]), row)
            for entry in entries
            for row in entry["rows"]
            if place_of(row) == place and (row["arm"] == "base") == (arm == "base")
        ]
        if found:
            when, rows = zip(*found, strict=True)
            values = [row["value"] for row in rows]
            ends = [[v - r["low"] for v, r in zip(values, rows, strict=True)]]
            ends.append([r["high"] - v for v, r in zip(values, rows, strict=True)])
            axes.errorbar(
                when,
                values,
                [[max(0.0, e) for e in end] for end in ends],
                color=style.colour,
                marker=mark,
                ms=4,
                lw=1.2,
                capsize=2,
                label=arm,
            )
    axes.set_title(f"{metric_label(metric)}, {readable(risk)}\n{readable(split)}" + (f" by {judge}" if judge else ""))
    axes.title.set_fontsize(9)
    axes.set_ylim(bottom=0)
    days = sorted({datetime.fromisoformat(entry["when"]) for entry in entries})
    axes.set_xticks([days[0], days[-1]] if len(days) > 1 else days)
    axes.xaxis.set_major_formatter(DateFormatter("%Y-%m-%d"))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
