"""The figures of a comparison: which of them suit follows from what the runs differ in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from policypatch.report.compare_lines import Column, Comparison, Line
from policypatch.report.compare_text import heading, label, short
from policypatch.report.drawing import INK, LINE, MUTED, ArmStyle, Panel, arm_styles, as_svg, new_axes
from policypatch.report.metrics import is_risk
from policypatch.report.scorecard import UTILITY, Row
from policypatch.report.wording import is_number

BARS = 12  # more would be lines of text that cannot be read
FLUENCY = ("ppl_median", "over_refusal", "benign_refusal", "text_ppl")  # what safety is bought with, the first there is


@dataclass(frozen=True)
class _Bar:
    """A bar: what it is called, whose colour it has, and its figure."""

    name: str
    arm: str
    row: Row


def panels(found: Comparison) -> list[Panel]:
    """Every figure that suits: a metric against a number, bars for a choice, the frontier, sizes and times."""
    base = found.bases[0] if len(found.bases) == 1 else None  # of several models none is everyone's
    lines = [line for line in found.drawn if line.arm != "base"]
    keys = [key for key in found.keys if key != "seed"] or ["seed"]
    shown = _figures_of(found, lines)
    if len(lines) < 2 or not shown:
        return []
    numeric = [key for key in keys if key != "seed" and _is_axis([line.values.get(key) for line in lines])]
    drawn: list[Panel] = []
    for key in numeric:
        rest = [k for k in keys if k != key]
        by = f", by {short(key, keys)}" if len(numeric) > 1 else ""  # figures of several keys, told apart
        drawn += [_against(key, rest, column, lines, base, by) for column in shown]
    if keys and not numeric and len(lines) <= BARS:
        drawn += [_bars(column, lines, keys, _value(base, column)) for column in shown]
    risk, cost = shown[0], next((c for name in FLUENCY for c in shown if c.metric == name), None)
    choice = keys != ["seed"] and len(_own_risks(lines)) < 2  # seeds, and patches of several risks, are no alternatives
    if cost is not None and len(lines) > 2 and is_risk(risk.metric) and choice:
        drawn.append(_scatter(cost, risk, lines, keys, base, "frontier: lower left is best"))
    return drawn + _cost_panels(found, lines, keys, risk, base)


def _own_risks(lines: Sequence[Line]) -> list[str]:
    """The risks that the runs are about, in their order."""
    names: list[str] = []
    for line in lines:
        settings = line.records[0].settings if line.records else {}
        parts = [key for key in settings if re.fullmatch(r"risk\.parts\.[^.]+\.risk\.name", key)]
        names += [str(settings.get(key) or "") for key in parts or ["risk.name"]]
    return [name for name in dict.fromkeys(names) if name]


def _cost_panels(
    found: Comparison, lines: Sequence[Line], keys: Sequence[str], risk: Column, base: Line | None
) -> list[Panel]:
    """Risk against trainable parameters, and times to answer, where methods differ in them."""
    sizes = next((c for c in found.costs if c.metric == "trainable_parameters"), None)
    both = [line for line in lines if sizes in line.cells and risk in line.cells] if sizes else []
    trained = [line for line in both if sizes and line.cells[sizes]["value"] > 0]
    drawn = []
    if sizes is not None and len({line.cells[sizes]["value"] for line in trained}) > 1:
        drawn.append(_scatter(sizes, risk, trained, keys, base, "risk against size", log=True))
    if len({line.arm for line in lines}) > 1:
        times = [c for c in found.costs if c.metric in ("first_token_ratio", "per_token_ratio")]
        drawn += [_times(c, lines, keys) for c in times if any(c in line.cells for line in lines)]
    return drawn


def _times(column: Column, lines: Sequence[Line], keys: Sequence[str]) -> Panel:
    """Times of every line, adapters both as they are and merged into the weights."""
    merged = replace(column, metric=f"{column.metric}_merged")
    bars = []
    for line in (line for line in lines if column in line.cells):
        bars.append(_Bar(label(line, keys), line.arm, line.cells[column]))
        if merged in line.cells:
            bars.append(_Bar(f"{label(line, keys)}, merged", line.arm, line.cells[merged]))
    return _drawn_bars(column, bars, 1.0)


def _figures_of(found: Comparison, lines: Sequence[Line]) -> list[Column]:
    """The risk's headline by one judge, the same by others, and what it is bought with; of several risks each one's."""
    present = [c for c in found.columns if sum(c in line.cells for line in lines) > 1]
    if not present:
        return []
    if len(own := _own_risks(lines)) > 1:  # each one's headline, of all the patches: what is bought with the others
        headlines = [next((c for c in present if c.risk == risk and is_risk(c.metric)), None) for risk in own]
        return [c for c in (*headlines, *(c for c in present if c.risk == UTILITY)) if c is not None]
    first = present[0]
    risk = [c for c in present if (c.risk, c.split, c.metric) == (first.risk, first.split, first.metric)][:2]
    bought = [c for name in FLUENCY for c in present if c.metric == name and c.risk in (first.risk, UTILITY)]
    distinct = {c.metric: c for c in reversed(bought)}
    return [*risk, *(distinct[name] for name in FLUENCY if name in distinct)][:4]


def _is_axis(values: Sequence[Any]) -> bool:
    return all(is_number(value) for value in values) and len(set(values)) > 2


def _against(key: str, rest: Sequence[str], column: Column, lines: Sequence[Line], base: Line | None, by: str) -> Panel:
    """A metric against a numeric setting, a curve for each choice of the other settings; `by` ends its title."""
    figure, axes = new_axes()
    curves: dict[str, list[Line]] = {}
    for line in lines:
        if column in line.cells:
            curves.setdefault(label(line, rest) if rest else line.arm, []).append(line)
    scattered = len(curves) > 1 and all(len(members) == 1 for members in curves.values())
    if scattered:  # a search, in which no two runs share the rest: points, not curves
        curves = {"runs": [line for members in curves.values() for line in members]}
    styles = list(arm_styles([line.arm for line in lines]).values()) if len(curves) == 1 else _styles(curves)
    told = []
    for style, (name, members) in zip(styles, curves.items(), strict=False):
        members = sorted(members, key=lambda line: line.values[key])
        xs = [line.values[key] for line in members]
        _curve(axes, xs, [line.cells[column] for line in members], style, name, joined=not scattered)
        told.append(f"{name} " + ", ".join(f"{x.values[key]}: {x.cells[column]['value']:.3g}" for x in members))
    _base_line(axes, column, base)
    xs = sorted({line.values[key] for line in lines})
    log = min(xs) > 0 and max(xs) / min(xs) > 8
    if log:
        axes.set_xscale("log")
    if not scattered:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
    elif log:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # its own writes TeX, which an SVG shows as it is
    axes.minorticks_off()
    axes.set_xlabel(key, color=MUTED)
    _from_zero(axes, column)
    if len(curves) > 1:
        axes.legend(fontsize=9, frameon=False)
    return _panel(figure, column, f"by {key}: " + "; ".join(told), styles, by)


def _bars(column: Column, lines: Sequence[Line], keys: Sequence[str], base: float | None) -> Panel:
    """A bar for each line, in the colour of its arm; dashed where the base is."""
    bars = [_Bar(label(line, keys), line.arm, line.cells[column]) for line in lines if column in line.cells]
    return _drawn_bars(column, bars, base)


def _drawn_bars(column: Column, bars: Sequence[_Bar], base: float | None) -> Panel:
    figure, axes = new_axes()
    styles = arm_styles([bar.arm for bar in bars])
    for place, bar in enumerate(bars):
        axes.barh(place, bar.row["value"], color=styles[bar.arm].colour, alpha=0.85, height=0.62)
        if is_number(bar.row.get("low")) and is_number(bar.row.get("high")):
            axes.plot([bar.row["low"], bar.row["high"]], [place, place], color=INK, lw=1.2)
        if is_number(bar.row.get("base")):  # asked of fewer prompts, the base came to this on them
            axes.plot([bar.row["base"]] * 2, [place - 0.31, place + 0.31], color=MUTED, lw=1.6)
    axes.set_yticks(range(len(bars)), [_wrapped(bar.name) for bar in bars], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=LINE, lw=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if base is not None:
        axes.axvline(base, color=MUTED, lw=1, ls=(0, (2, 2)))
        axes.set_xlabel("dashed: base", color=MUTED)
    told = ", ".join(f"{bar.name} {bar.row['value']:.3g}" for bar in bars)
    return _panel(figure, column, told, list(styles.values()))


def _scatter(
    x: Column,
    y: Column,
    lines: Sequence[Line],
    keys: Sequence[str],
    base: Line | None,
    title: str,
    log: bool = False,
) -> Panel:
    """One figure against another, a numbered point for each line."""
    figure, axes = new_axes()
    lines = [line for line in lines if x in line.cells and y in line.cells]
    styles = arm_styles([line.arm for line in lines])
    told = []
    for number, line in enumerate(lines, 1):
        style, at = styles[line.arm], (line.cells[x]["value"], line.cells[y]["value"])
        for axis, row in (("x", line.cells[x]), ("y", line.cells[y])):
            if is_number(row.get("low")) and is_number(row.get("high")) and not (log and axis == "x"):
                ends = [row["low"], row["high"]]
                across = (ends, [at[1]] * 2) if axis == "x" else ([at[0]] * 2, ends)
                axes.plot(*across, color=style.colour, lw=0.8, alpha=0.4)
        axes.plot(*at, "o", color=style.colour, ms=5)
        axes.annotate(str(number), at, xytext=(4, 4), textcoords="offset points", fontsize=9, color=INK)
        told.append(f"{number} {label(line, keys)}")
    if not log and len(front := _front([(line.cells[x]["value"], line.cells[y]["value"]) for line in lines])) > 1:
        axes.plot(*zip(*front, strict=True), color=MUTED, lw=0.9, zorder=1)
        told.append("line: those that no other beats in both")
    if base is not None and x in base.cells and y in base.cells and not log:
        axes.plot(base.cells[x]["value"], base.cells[y]["value"], "x", color=INK, ms=6)
        told.append("× base")
    if log:
        axes.set_xscale("log")
        sizes = [line.cells[x]["value"] for line in lines]
        axes.set_xlim(10 ** math.floor(math.log10(min(sizes))), 10 ** math.ceil(math.log10(max(sizes) * 1.01)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        _base_line(axes, y, base)
    axes.grid(axis="x", color=LINE, lw=0.8)
    axes.set_xlabel(" ".join(filter(None, heading(x))), color=MUTED)
    axes.set_ylabel(heading(y)[0], color=MUTED)
    _from_zero(axes, y)
    return Panel(title, as_svg(figure, f"{title}: {'; '.join(told)}", list(styles.values())), "; ".join(told))


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats in both, from left to right."""
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    return sorted(set(points) - beaten)


def _curve(
    axes: Axes, xs: Sequence[float], rows: Sequence[Any], style: ArmStyle, name: str, joined: bool = True
) -> None:
    """Points joined by a line, each with its interval."""
    mark = "-o" if joined else "o"
    axes.plot(xs, [row["value"] for row in rows], mark, color=style.colour, lw=1.6, ms=4, label=name)
    for x, row in zip(xs, rows, strict=True):
        if is_number(row.get("low")) and is_number(row.get("high")):
            axes.plot([x, x], [row["low"], row["high"]], color=style.colour, lw=1, alpha=0.6)


def _value(line: Line | None, column: Column) -> float | None:
    return None if line is None or column not in line.cells else float(line.cells[column]["value"])


def _base_line(axes: Axes, column: Column, base: Line | None) -> None:
    if (value := _value(base, column)) is not None:
        axes.axhline(value, color=MUTED, lw=1, ls=(0, (2, 2)), zorder=1)


def _from_zero(axes: Axes, column: Column) -> None:
    """Rates start at 0; a perplexity has no such floor."""
    if not column.metric.startswith(("ppl", "text_ppl")):
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if isinstance(axes.yaxis.get_major_formatter(), ScalarFormatter):
        axes.ticklabel_format(axis="y", style="plain")


def _styles(names: Iterable[str]) -> list[ArmStyle]:
    """Colours for what is no arm: the patch's first, then those of other arms."""
    found = list(arm_styles(["patch", "other 1", "other 2", "other 3", "teacher", "sft"]).values())
    return [found[i % len(found)] for i, _ in enumerate(names)]


def _panel(figure: Any, column: Column, told: str, styles: Sequence[ArmStyle], ending: str = "") -> Panel:
    name, by = heading(column)
    title = f"{name} ({by}){ending}" if by else f"{name}{ending}"
    return Panel(title, as_svg(figure, f"{title}, {told}", list(dict.fromkeys(styles))))


def _wrapped(name: str, width: int = 22) -> str:
    """A bar's name in lines that leave room for the bar."""
    out = [""]
    for word in name.split(" "):
        if out[-1] and len(out[-1]) + len(word) >= width:
            out.append("")
        out[-1] = f"{out[-1]} {word}".strip()
    return "\n".join(out[:3])
