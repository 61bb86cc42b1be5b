"""Runs side by side: which differ in what, what each came to, and those that failed; as a page, CSV and Markdown.

compare([Path("outputs/length")], Path("outputs/length"))   # compare.html, compare.csv, compare.md
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import COST
from policypatch.files.atomic import write_text
from policypatch.report.costs import cost_label, cost_text
from policypatch.report.metrics import is_risk, metric_label
from policypatch.report.records import Record, differing, find_records
from policypatch.report.scorecard import (
    UTILITY,
    Group,
    Row,
    costs_of,
    final_arm,
    groups_of,
    own_and_others,
    readable,
)
from policypatch.report.scorecard import Line as TableLine
from policypatch.report.wording import is_number, number

REFUSALS = ("over_refusal", "benign_refusal")
QUALITY = ("ppl_median", "text_ppl", "kl_benign")
COSTS = ("trainable_parameters", "train_seconds", "first_token_ratio", "per_token_ratio", "per_token_ratio_merged")
TIDY = ("arm", "risk", "split", "metric", "judge", "filter", "value", "low", "high", "n", "upper")
PAIRED = ("delta", "delta_low", "delta_high", "p_value")


@dataclass(frozen=True)
class Column:
    """A figure that runs are compared by."""

    risk: str
    split: str
    metric: str
    judge: str | None

    @classmethod
    def of_line(cls, group: Group, line: TableLine) -> Column:
        """The column of a line of a scorecard's table."""
        return cls(group.risk, group.split, line.metric, line.judge)

    @classmethod
    def of(cls, row: Row) -> Column:
        """The column that a scorecard row stands in."""
        return cls(str(row.get("risk")), str(row.get("split")), str(row["metric"]), row.get("judge"))


@dataclass(frozen=True)
class Line:
    """A row of the comparison.

    Attributes:
        name: base, or the run's folder; of seeds taken together how many there are.
        arm: whose figures these are.
        values: of the differing keys.
        cells: scorecard rows by column; of seeds taken together `value` is their mean, `low` and `high` the extremes.
        record: the run; None for the base and for several.
    """

    name: str
    arm: str
    values: Mapping[str, Any]
    cells: Mapping[Column, Row]
    record: Record | None = None


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        records: all runs.
        keys: in what they differ.
        columns: what the table shows; the CSV has everything.
        lines: the base's, then one for each finished run.
        over_seeds: one for each setting, where runs differ in their seed as well; else none.
    """

    records: Sequence[Record]
    keys: Sequence[str]
    columns: Sequence[Column]
    lines: Sequence[Line]
    over_seeds: Sequence[Line] = field(default_factory=list)

    @property
    def bases(self) -> list[Line]:
        """The lines of the base: one for each model."""
        return [line for line in self.lines if line.record is None]

    @property
    def failed(self) -> list[Record]:
        """Runs without a scorecard."""
        return [record for record in self.records if not record.finished]

    def summary(self) -> str:
        """For the terminal: how many there are, what they shared, and what became of those that failed."""
        done = len(self.records) - len(self.failed)
        lines = [f"{done} of {len(self.records)} runs finished"]
        if made := self.made:
            shared = ", ".join(f"{kind} {misses} made {hits} found" for kind, (misses, hits) in sorted(made.items()))
            lines.append(f"cache, all runs: {shared}")
        lines += [f"failed: {record.folder.name}: {record.error}" for record in self.failed]
        return "\n".join(lines)

    @property
    def made(self) -> dict[str, tuple[int, int]]:
        """By kind how many entries of the cache the runs made, and how many they found made."""
        total: dict[str, tuple[int, int]] = {}
        for record in self.records:
            for kind, counts in (record.run.get("cache") or {}).items():
                misses, hits = total.get(kind, (0, 0))
                total[kind] = misses + counts["misses"], hits + counts["hits"]
        return total


def compare(folders: Sequence[Path], out: Path) -> Comparison:
    """Compare the runs at or below these folders and write `compare.html`, `compare.csv` and `compare.md` into `out`.

    Raises:
        PolicyPatchError: a folder without runs, or a file that cannot be read.
    """
    from policypatch.report.compare_page import page

    found = comparison(find_records(folders))
    write_text(out / "compare.csv", tidy(found))
    write_text(out / "compare.md", markdown(found))
    write_text(out / "compare.html", page(found, out))
    return found


def say(found: Comparison, out: Path) -> None:
    """What was compared and where it stands, on the terminal."""
    Console(soft_wrap=True).print(f"{found.summary()}\n{out / 'compare.html'}", markup=False, highlight=False)


def comparison(records: Sequence[Record]) -> Comparison:
    """Arrange the runs."""
    if not records:
        raise PolicyPatchError("there is no run to compare")
    finished = [record for record in records if record.finished]
    keys = differing([record.settings for record in finished or records])
    lines = sorted((_line(record, keys) for record in finished), key=lambda line: _order(line, keys))
    columns = _columns(finished)
    over_seeds = _over_seeds(lines, keys) if "seed" in keys else []
    return Comparison(records, keys, columns, [*_base_lines(finished, columns), *lines], over_seeds)


def label(line: Line, keys: Sequence[str]) -> str:
    """A line in a figure's words: the values that tell it from the others."""
    values = {key: line.values.get(key) for key in keys if line.values.get(key) is not None}
    told = [value if isinstance(value, str) else f"{short(key)} {value_text(value)}" for key, value in values.items()]
    return ", ".join(told) or line.name


def short(key: str) -> str:
    """A key by its last part, or by its first where that is only "name" or the like."""
    first, _, last = key.rpartition(".")
    return first.rpartition(".")[2] if first and last in ("name", "kind", "enabled") else last


def value_text(value: Any) -> str:
    """A setting in a table."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)


def heading(column: Column) -> tuple[str, str]:
    """A column's name, and what it was measured on and by."""
    if column.risk == COST:
        return cost_label(column.metric), "" if column.split == "training" else column.split
    places = [] if column.split == column.metric else [readable(column.split)]
    return metric_label(column.metric), ", ".join([*places, *([column.judge] if column.judge else [])])


def cell_text(column: Column, row: Row | None) -> str:
    """A figure with its interval."""
    if row is None:
        return "–"
    if column.risk == COST:
        return cost_text(row)
    if row.get("low") is None:
        return number(row["value"])
    return f"{number(row['value'])} [{number(row['low'])}, {number(row['high'])}]"


def tidy(found: Comparison) -> str:
    """Every figure of every arm as CSV, a row each; a run that failed has one row with its error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *found.keys, *TIDY, *PAIRED, "error"])
    for record in found.records:
        start = [record.folder.name, *(record.settings.get(key) for key in found.keys)]
        for row in record.rows:
            writer.writerow([*start, *(row.get(name) for name in (*TIDY, *PAIRED)), ""])
        if not record.finished:
            writer.writerow([*start, *[""] * len((*TIDY, *PAIRED)), record.error])
    return text.getvalue()


def markdown(found: Comparison) -> str:
    """The table for a README or an issue."""
    parts = []
    if found.over_seeds:
        keys = [key for key in found.keys if key != "seed"]
        parts += [_markdown_table(found.over_seeds, keys, found.columns, "seeds"), ""]
        parts += ["Means over the seeds, in brackets the lowest and the highest. Each run, with 95 % intervals:", ""]
    parts.append(_markdown_table(found.lines, found.keys, found.columns, "run"))
    if found.failed:
        parts += ["", "Failed:", "", *(f"- {record.folder.name}: {record.error}" for record in found.failed)]
    return "\n".join(parts) + "\n"


def _markdown_table(lines: Sequence[Line], keys: Sequence[str], columns: Sequence[Column], first: str) -> str:
    shown = [column for column in columns if any(column in line.cells for line in lines)]
    heads = [" ".join(part for part in (name, f"({by})" if by else "") if part) for name, by in map(heading, shown)]
    rows = [[first, "arm", *keys, *heads]]
    rows.append(["---"] * len(rows[0]))
    for line in lines:
        settings = [value_text(line.values.get(key)) for key in keys]
        rows.append([line.name, line.arm, *settings, *(cell_text(c, line.cells.get(c)) for c in shown)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _line(record: Record, keys: Sequence[str]) -> Line:
    arm = final_arm(record.rows) or "base"
    cells = {Column.of(row): row for row in record.rows if row["arm"] == arm}
    return Line(record.folder.name, arm, {key: record.settings.get(key) for key in keys}, cells, record)


def _order(line: Line, keys: Sequence[str]) -> list[tuple[bool, float, str]]:
    """By the values of the keys, numbers as numbers."""
    values = [line.values[key] for key in keys]
    return [(not is_number(value), float(value) if is_number(value) else 0.0, str(value)) for value in values]


def _base_lines(finished: Sequence[Record], columns: Sequence[Column]) -> list[Line]:
    """The base's figures: one line where all runs have the same base and ask it the same."""
    cells: dict[str, dict[Column, Row]] = {}
    for record in finished:
        own = cells.setdefault(str(record.settings.get("model.name")), {})
        for row in record.rows:
            # Of a set that is one run's own and another's side, the larger measurement counts.
            known = own.get(Column.of(row))
            if row["arm"] == "base" and (known is None or row.get("n", 0) > known.get("n", 0)):
                own[Column.of(row)] = row
    several = len(cells) > 1
    return [
        Line("base", "base", {"model.name": model} if several else {}, {c: r for c, r in own.items() if c in columns})
        for model, own in cells.items()
        if own
    ]


def _columns(finished: Sequence[Record]) -> list[Column]:
    """What speaks for each run: its own risk's figures and fluency, others' headlines and refusals, utility, costs."""
    found: dict[Column, None] = {}
    costs: dict[Column, None] = {}
    for record in finished:
        own, others = own_and_others(groups_of(record.rows))
        for group in [*own, *others]:
            found |= dict.fromkeys(Column.of_line(group, line) for line in _speaking(group, group is own[0]))
        groups = costs_of(record.rows)
        loads = [group.split for group in groups if group.split != "training"]
        for group in groups:
            if group.split in ("training", *loads[:1]):
                costs |= dict.fromkeys(Column.of_line(group, line) for line in group.lines if line.metric in COSTS)
    return [*found, *sorted(costs, key=lambda column: COSTS.index(column.metric))]


def _speaking(group: Group, first: bool) -> list[TableLine]:
    """Of a group's lines those that speak for it: all that matter in the first, else one for each kind."""
    risk = [line for line in group.lines if is_risk(line.metric)]
    refusals = [line for line in group.lines if line.metric in REFUSALS]
    quality = [line for line in group.lines if line.metric in QUALITY and (first or group.risk == UTILITY)]
    return [*risk, *refusals, *quality] if first else [*risk[:1], *refusals[:1], *quality]


def _over_seeds(lines: Sequence[Line], keys: Sequence[str]) -> list[Line]:
    """Lines of the same settings but the seed, as one each."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(str(line.values.get(key)) for key in keys if key != "seed"), []).append(line)
    return [_mean(group) for group in groups.values()] if any(len(group) > 1 for group in groups.values()) else []


def _mean(lines: Sequence[Line]) -> Line:
    cells: dict[Column, Row] = {}
    for column, row in lines[0].cells.items():
        values = [float(line.cells[column]["value"]) for line in lines if column in line.cells]
        if len(values) == len(lines):
            mean = sum(values) / len(values)
            cells[column] = {**row, "value": mean, "low": min(values), "high": max(values)}
    return Line(f"{len(lines)} seeds", lines[0].arm, {**lines[0].values, "seed": None}, cells)
