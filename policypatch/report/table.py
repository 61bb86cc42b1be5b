"""The scorecard of a run as a terminal table that fits 80 columns.

The split that the headline speaks of in full: the roomiest of a few layouts that fits is taken. Where none does, arms
are left out and named below the table: a clipped number would be a wrong one. Then the rest, one line for each metric
and judge, without intervals: the own risk's other splits, the side effects, utility.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from policypatch.report.scorecard import (
    LEVEL,
    Effect,
    Group,
    Line,
    Row,
    arms_of,
    by_risk,
    delta_of,
    effect_of,
    final_arm,
    groups_of,
    readable,
    unjudged,
)
from policypatch.report.wording import MARKED, arrow, is_number, number, percent

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
_MARK: dict[Effect, str] = {"better": " ✓", "worse": " ✗", "unclear": " ~", "neutral": "  "}


def scorecard_table(rows: Iterable[Row], level: float = LEVEL) -> RenderableType:
    """The first split of the own risk: metric, judge (* as `MARKED` says), the arms, the final arm's change.

    Below it, where there is more, its other splits, the other risks and utility for base and final arm alone.
    `level` is that of the rows' intervals (`evaluate.level`).
    """
    rows = list(rows)
    groups = groups_of(rows)
    if not groups:  # costs alone are no figures of a risk
        return Text("The scorecard is empty.")
    first, *rest = groups
    final = final_arm(rows)
    table, left_out = _full(first, final, level)
    parts: list[RenderableType] = [table]
    if rest:
        title = "other prompts and side effects" if rest[0].risk == first.risk else "side effects"
        parts += ["", _compact_table(title, rest, final, level)]
    return Stack(*parts, _caption(rows, final, left_out, level))


def _full(group: Group, final: str | None, level: float) -> tuple[Table, list[str]]:
    """The table, and the arms that are left out of it for width."""
    arms = arms_of(row for line in group.lines for row in line.cells.values())
    left_out: list[str] = []
    while True:
        for layout in _LAYOUTS:
            table = _build(group, arms, final, layout, level)
            if _width(table) <= WIDTH:
                return table, left_out
        spare = [arm for arm in arms if arm not in ("base", final)]
        if not spare:
            return table, left_out  # names alone are too wide: rich folds them
        left_out = [*left_out, spare[-1]]
        arms = [arm for arm in arms if arm != spare[-1]]


def _width(table: Table) -> int:
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def _empty(title: str, gap: int) -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, gap - 1, 0, 0), pad_edge=False, title=Text(title))


def _build(group: Group, arms: list[str], final: str | None, layout: _Layout, level: float) -> Table:
    table = _empty(group.label, layout.gap)
    table.add_column("metric", overflow="fold", max_width=layout.names)
    table.add_column("judge", overflow="fold", max_width=layout.names)
    for arm in arms:
        table.add_column(Text(arm), overflow="fold", no_wrap=False)
    if final is not None:
        table.add_column(Text("change"), overflow="fold", justify="right")
    for line in group.lines:
        table.add_row(*_cells(line, arms, final, layout.stacked, level))
    return table


def _compact_table(title: str, groups: list[Group], final: str | None, level: float) -> Table:
    """One line for each metric and judge: a block for each risk, the split named on its first line."""
    table = _empty(title, 2)
    for name in ("risk, split", "metric", "judge"):
        table.add_column(name, overflow="fold", max_width=18)
    arms = [arm for arm in ("base", final) if arm is not None]
    for arm in arms:
        table.add_column(Text(arm), justify="right", no_wrap=True)
    if final is not None:
        table.add_column("change", justify="right", no_wrap=True)
    for risk, splits in by_risk(groups):
        table.add_row(Text(risk, style="bold"))
        for group in splits:
            for i, line in enumerate(group.lines):
                values = [Text(number(line.cells.get(arm, {}).get("value"))) for arm in arms]
                change = [] if final is None else [_change(line, final, level)]
                split = Text("" if i else f" {readable(group.split)}")
                table.add_row(split, Text(line.label), Text(_judge(line)), *values, *change)
        table.add_section()
    return table


def _judge(line: Line) -> str:
    return f"{line.judge or '–'}{'*' if line.filtered else ''}"


def _cells(line: Line, arms: Sequence[str], final: str | None, stacked: bool, level: float) -> list[Text]:
    cells = [Text(line.label), Text(_judge(line))]
    cells += [_value(line.cells.get(arm), stacked) for arm in arms]
    if final is not None:
        cells.append(_change(line, final, level))
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


def _change(line: Line, final: str, level: float) -> Text:
    row, base = line.cells.get(final), line.cells.get("base")
    if row is None or base is None:
        return Text("–")
    delta = delta_of(row, base)
    if delta is None:
        return Text("–")
    effect = effect_of(row, base, level)
    return Text(f"{arrow(delta)}{number(abs(delta))}{_MARK[effect]}", style=_STYLE[effect])


def _caption(rows: list[Row], final: str | None, left_out: list[str], level: float) -> Text:
    notes = []
    if final is not None:
        notes.append(f"change: {final} against base, ✓ better, ✗ worse, ~ not clear")
    notes.append(f"[ ]: {percent(level)} interval over prompts")
    if any(row.get("filter") for row in rows):
        notes.append(MARKED)
    notes += unjudged(rows)
    if left_out:
        notes.append(f"left out for width: {', '.join(left_out)}")
    return Text("\n".join(notes))
