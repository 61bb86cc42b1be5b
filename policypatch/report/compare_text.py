"""A comparison in words: headings and cells, its tables, as CSV and in Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policypatch.evaluate.scorecard import COST
from policypatch.evaluate.statistics import Difference
from policypatch.report.compare_lines import Column, Comparison, Line
from policypatch.report.costs import LABELS, cost_label, cost_text, load_name
from policypatch.report.head_to_head import difference_text, head_to_head
from policypatch.report.metrics import metric_label
from policypatch.report.scorecard import Row, evidence_of, readable
from policypatch.report.wording import MARKED, number

TIDY = ("arm", "risk", "split", "metric", "judge", "filter", "value", "low", "high", "n", "upper")
RIVALS = (
    "The others less the patch, prompt by prompt, a prompt's value being the mean over the seeds; in brackets the "
    "interval over prompts; of perplexities the ratio of geometric means. ✓ and ✗: measurably "
    "less and more (interval and test)."
)
PAIRED = ("delta", "delta_low", "delta_high", "p_value")


@dataclass(frozen=True)
class Table:
    """Lines of a comparison under some of its columns.

    Attributes:
        name: its heading.
        first: heading of the lines' names.
        keys: settings that are shown.
        lines: its rows.
        columns: figures that are shown.
        note: what its brackets are.
    """

    name: str
    first: str
    keys: Sequence[str]
    lines: Sequence[Line]
    columns: Sequence[Column]
    note: str


def tables(found: Comparison) -> list[Table]:
    """Seeds together where there are any, every run, and what they cost."""
    seedless = [key for key in found.keys if key != "seed"]
    each = "In brackets the interval over prompts. Where a run asked fewer of a set: how many, and the base on these."
    made = [Table("Each run", "run", found.keys, found.lines, found.columns, each)]
    if found.over_seeds:
        note = (
            "Means over the seeds; in brackets the lowest and the highest; of the base, of arms that no seed "
            "changes and of a single seed the interval over prompts, which for the others stands at each run."
        )
        lines = [*found.bases, *found.over_seeds]
        made.insert(0, Table("Over seeds", "seeds", seedless, lines, found.columns, note))
    if found.costs:
        note = (
            "Times are ratios to the base, timed in turn, with the quartiles of the pairs; arms of one shape share "
            "them, and a teacher, which is another model or chooses among samples, has none. Seconds and memory are "
            "those of the two stages, of seeds with the lowest and the highest; a stage that the cache had keeps those "
            "of the run that trained it, and on a CPU memory is the whole process's, earlier runs' leavings included."
        )
        costly = [line for line in found.settings if any(column in line.cells for column in found.costs)]
        made.append(Table("Costs", "runs", seedless, costly, _ordered(found.costs), note))
    return [_shown(table) for table in made]


def _shown(table: Table) -> Table:
    """Without columns that no line has, and with a word on those that are marked."""
    columns = [column for column in table.columns if any(column in line.cells for line in table.lines)]
    marked = f" {MARKED}." if any(column.marked for column in columns) else ""
    return Table(table.name, table.first, table.keys, table.lines, columns, f"{table.note}{marked}")


def _ordered(costs: Sequence[Column]) -> list[Column]:
    """Sizes and training first, then times load by load."""
    loads = list(dict.fromkeys(column.split for column in costs if column.split != "training"))
    order = ["training", *loads]
    return sorted(costs, key=lambda c: (order.index(c.split), [*LABELS].index(c.metric) if c.metric in LABELS else 99))


def label(line: Line, keys: Sequence[str]) -> str:
    """A line in a figure's words: the values that tell it from the others."""
    values = {key: line.values.get(key) for key in keys if line.values.get(key) is not None}
    told = [
        value if isinstance(value, str) else f"{short(key, keys)} {value_text(value)}" for key, value in values.items()
    ]
    return ", ".join(told) or line.name


def short(key: str, among: Sequence[str] = ()) -> str:
    """A key by its last part, its first where that is "name" or the like, and whole where another is called so."""
    name = _last_part(key)
    return key if any(_last_part(other) == name for other in among if other != key) else name


def _last_part(key: str) -> str:
    first, _, last = key.rpartition(".")
    return first.rpartition(".")[2] if first and last in ("name", "kind", "enabled") else last


def value_text(value: Any) -> str:
    """A setting in a table."""
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)


def heading(column: Column) -> tuple[str, str]:
    """A column's name, and what it was measured on and by; * where that had a part in training."""
    if column.risk == COST:
        return cost_label(column.metric), "" if column.split == "training" else load_name(column.split)
    places = [readable(column.risk)] * column.ambiguous
    places += [] if column.split == column.metric else [readable(column.split)]
    name, by = metric_label(column.metric), ", ".join([*places, *([column.judge] if column.judge else [])])
    mark = "*" * column.marked
    return (name, f"{by}{mark}") if by else (f"{name}{mark}", by)


def _head(column: Column) -> str:
    name, by = heading(column)
    return f"{name} ({by})" if by else name


def cell_text(column: Column, row: Row | None) -> str:
    """A figure with its interval."""
    if row is None:
        return "–"
    if column.risk == COST:
        ends = [cost_text({**row, "value": row.get(end, row["value"])}) for end in ("low", "high")]
        low, high = (end.removesuffix(" ×") for end in ends)
        text = f"{cost_text(row)}{f' [{low}, {high}]' if low != high else ''}"
    else:
        text = number(row["value"])
        if row.get("low") is not None:
            text += f" [{number(row['low'])}, {number(row['high'])}]"
    if "seeds" in row:
        text += f" ({row['seeds']})"
    return f"{text} of {row['n']}; base {number(row['base'])}" if "base" in row else text


def against_patch(found: Comparison) -> list[list[str]]:
    """The other settings less the patch: headings, then a row for each; nothing where that is not what is compared."""
    rivals, keys = head_to_head(found), [key for key in found.keys if key != "seed"]
    if rivals is None:
        return []
    rows = [["less the patch", *map(_head, rivals.columns)]]
    for place, line in enumerate(rivals.lines):
        cells = [_difference_text(c, rivals.differences.get((place, c))) for c in rivals.columns]
        rows.append([label(line, keys), *cells])
    return rows


def _difference_text(column: Column, difference: Difference | None) -> str:
    """As `difference_text`, marked where both interval and test say so."""
    if difference is None:
        return "–"
    evidence = {"delta_low": difference.low, "delta_high": difference.high, "p_value": difference.p_value}
    mark = (" ✓" if difference.mean < 0 else " ✗") if difference.mean and all(evidence_of(evidence)) else ""
    return f"{difference_text(column.metric, difference)}{mark}"


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


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first one the headings."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def markdown(table: Table) -> str:
    """A table for a README or an issue, its note before it."""
    heads = [_head(column) for column in table.columns]
    rows = [[table.first, "arm", *table.keys, *heads]]
    for line in table.lines:
        settings = [value_text(line.values.get(key)) for key in table.keys]
        rows.append([line.name, line.arm, *settings, *(cell_text(c, line.cells.get(c)) for c in table.columns)])
    return f"{table.note}\n\n{markdown_table(rows)}"
