"""The scorecard of a run as a terminal table that fits 80 columns.

The roomiest of a few layouts that fits is taken. Where none does, arms are left out and named below the
table: a clipped number would be a wrong one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from policypatch.report.scorecard import (
    LEVEL,
    Effect,
    Line,
    Row,
    arms_of,
    arrow,
    delta_of,
    effect_of,
    final_arm,
    groups_of,
    is_number,
    number,
    percent,
)

WIDTH = 80


@dataclass(frozen=True)
class _Layout:
    """One way to set the table; a metric or judge longer than `names` is folded, never cut."""

    stacked: bool  # the interval below its value instead of beside it
    gap: int
    names: int


# From the roomiest to the tightest; the last one holds five arms.
_LAYOUTS = (_Layout(False, 2, 18), _Layout(True, 2, 18), _Layout(True, 1, 15), _Layout(True, 1, 9))
_STYLE: dict[Effect, str] = {"better": "green", "worse": "red", "unclear": "dim", "neutral": "dim"}
_MARK: dict[Effect, str] = {"better": " ✓", "worse": " ✗", "unclear": " ~", "neutral": ""}


def scorecard_table(rows: Iterable[Row], level: float = LEVEL) -> Table:
    """The table: metric, judge (one that filtered the pairs marked *), the arms, the final arm's change.

    `level` is that of the rows' intervals (`evaluate.level`).
    """
    rows = list(rows)
    arms = arms_of(rows)
    final = final_arm(rows)
    left_out: list[str] = []
    while True:
        for layout in _LAYOUTS:
            table = _build(rows, arms, final, left_out, layout, level)
            if _width(table) <= WIDTH:
                return table
        spare = [arm for arm in arms if arm not in ("base", final)]
        if not spare:
            return table  # names alone are too wide: rich folds them
        left_out = [*left_out, spare[-1]]
        arms = [arm for arm in arms if arm != spare[-1]]


def _width(table: Table) -> int:
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def _build(
    rows: list[Row], arms: list[str], final: str | None, left_out: list[str], layout: _Layout, level: float
) -> Table:
    groups = groups_of(rows)
    one = len(groups) == 1
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, layout.gap - 1, 0, 0),
        pad_edge=False,
        title=Text(groups[0].label) if one else None,
        caption=_caption(rows, final, left_out, level),
        caption_justify="left",
    )
    table.add_column("metric", overflow="fold", max_width=layout.names)
    table.add_column("judge", overflow="fold", max_width=layout.names)
    for arm in arms:
        table.add_column(Text(arm), overflow="fold", no_wrap=False)
    if final is not None:
        table.add_column(Text("change"), overflow="fold", justify="right")
    for group in groups:
        if not one:
            table.add_row(Text(group.label, style="bold"))
        for line in group.lines:
            table.add_row(*_cells(line, arms, final, layout.stacked))
        table.add_section()
    return table


def _cells(line: Line, arms: Sequence[str], final: str | None, stacked: bool) -> list[Text]:
    judge = "–" if line.judge is None else f"{line.judge}{'*' if line.filtered else ''}"
    cells = [Text(line.label), Text(judge)]
    cells += [_value(line.cells.get(arm), stacked) for arm in arms]
    if final is not None:
        cells.append(_change(line, final))
    return cells


def _value(row: Row | None, stacked: bool) -> Text:
    text = Text(number(None if row is None else row.get("value")))
    if row is not None and is_number(row.get("low")) and is_number(row.get("high")):
        interval = f"[{_compact(row['low'])},{_compact(row['high'])}]"
        text.append(("\n" if stacked else " ") + interval, style="dim")
    return text


def _compact(value: float) -> str:
    """A bound without its leading zero: .19, −.03, 12.1."""
    text = number(value)
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("−").startswith("0.") else text


def _change(line: Line, final: str) -> Text:
    row, base = line.cells.get(final), line.cells.get("base")
    if row is None or base is None:
        return Text("–")
    delta = delta_of(row, base)
    if delta is None:
        return Text("–")
    effect = effect_of(row, base)
    return Text(f"{arrow(delta)}{number(abs(delta))}{_MARK[effect]}", style=_STYLE[effect])


def _caption(rows: list[Row], final: str | None, left_out: list[str], level: float) -> Text:
    notes = []
    if final is not None:
        notes.append(f"change: {final} against base, ✓ better, ✗ worse, ~ not clear")
    notes.append(f"[ ]: {percent(level)} interval over prompts")
    if any(row.get("filter") for row in rows):
        notes.append("* this judge also filtered the training pairs")
    if left_out:
        notes.append(f"left out for width: {', '.join(left_out)}")
    return Text("\n".join(notes))
