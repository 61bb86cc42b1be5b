"""What the rows of a scorecard mean: names, order, direction, and which arm and judge speak for a run.

Both views of a scorecard, the page and the terminal table, read it through here, so that they cannot
disagree about what counts as better. A metric that is not in METRICS is shown under its own name and
never called better or worse.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

Row = Mapping[str, Any]
Effect = Literal["better", "worse", "unclear", "neutral"]

LEVEL = 0.95  # of the intervals, where the config does not say


@dataclass(frozen=True)
class Metric:
    """How one metric is named and read; `better` is None where neither direction is good in itself."""

    label: str
    better: Literal["lower", "higher"] | None = "lower"
    risk: bool = True  # measures the risk itself: may be the headline; False: the quality of the text


# The order is the order of the rows; unknown metrics stand between the risk's own and the text's quality.
METRICS: dict[str, Metric] = {
    "toxic_rate": Metric("toxic rate"),
    "asr": Metric("attack success"),
    "gas": Metric("GAS"),
    "amt": Metric("AMT"),
    "gld": Metric("GLD"),
    "over_refusal": Metric("over-refusal", risk=False),
    "ppl_median": Metric("median PPL", risk=False),
    "ppl_mean": Metric("mean PPL", risk=False),
    "trigram_overlap": Metric("trigram overlap", risk=False),
    "completion_tokens": Metric("tokens", better=None, risk=False),
}
_FIRST_QUALITY = list(METRICS).index("over_refusal")
_FIRST_ARMS, _LAST_ARMS = ("base", "sft"), ("patch", "teacher")


@dataclass
class Line:
    """One metric by one judge: a row of the table, with one scorecard row for each arm."""

    metric: str
    judge: str | None
    filtered: bool  # this judge also filtered the training pairs
    cells: dict[str, Row] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The metric's name for a reader."""
        return metric_label(self.metric)


@dataclass
class Group:
    """The lines of one risk on one split."""

    risk: str
    split: str
    lines: list[Line] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The risk and split for a reader."""
        return " · ".join(part.replace("_", " ") for part in (self.risk, self.split) if part)


def metric_label(name: str) -> str:
    """The reader's name of a metric; an unknown one keeps its own."""
    return METRICS[name].label if name in METRICS else name.replace("_", " ")


def is_risk(name: str) -> bool:
    """Whether the metric measures the risk itself and so may carry the headline."""
    return METRICS[name].risk if name in METRICS else False


def _metric_rank(name: str) -> float:
    return list(METRICS).index(name) if name in METRICS else _FIRST_QUALITY - 0.5


def arms_of(rows: Iterable[Row]) -> list[str]:
    """The arms in the order of their columns: base, sft, any others as they came, patch, teacher."""
    seen = list(dict.fromkeys(str(row["arm"]) for row in rows))
    others = [arm for arm in seen if arm not in _FIRST_ARMS + _LAST_ARMS]
    return [arm for arm in (*_FIRST_ARMS, *others, *_LAST_ARMS) if arm in seen]


def final_arm(rows: Iterable[Row]) -> str | None:
    """The arm that the run is about: the patch, or else the last one that is not base or teacher."""
    candidates = [arm for arm in arms_of(rows) if arm not in ("base", "teacher")]
    return candidates[-1] if candidates else None


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """The rows arranged as a table: a group for each risk and split, headline metrics first.

    Within a metric a judge that did not filter the training pairs comes before one that did.
    """
    groups: dict[tuple[str, str], Group] = {}
    lines: dict[tuple[str, str, str, str | None], Line] = {}
    for row in rows:
        risk, split = str(row.get("risk") or ""), str(row.get("split") or "")
        group = groups.setdefault((risk, split), Group(risk, split))
        key = (risk, split, str(row["metric"]), row.get("judge"))
        if key not in lines:
            lines[key] = Line(key[2], key[3], False)
            group.lines.append(lines[key])
        lines[key].filtered |= bool(row.get("filter"))
        lines[key].cells[str(row["arm"])] = row
    for group in groups.values():
        group.lines.sort(key=lambda line: (_metric_rank(line.metric), line.metric, line.filtered))
    return list(groups.values())


def is_number(value: object) -> TypeGuard[float]:
    """Whether a figure is there and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def delta_of(row: Row, base: Row | None) -> float | None:
    """The difference to the base: as given, or else from the two values."""
    if is_number(row.get("delta")):
        return float(row["delta"])
    if base is not None and is_number(row.get("value")) and is_number(base.get("value")):
        return float(row["value"]) - float(base["value"])
    return None


def effect_of(row: Row, base: Row | None) -> Effect:
    """Whether the arm is better than the base: a claim only where all the evidence given bears it out.

    The evidence is the interval of the paired difference and the paired test; with neither, or with
    either against it, the answer is "unclear". A metric without a good direction is "neutral".
    """
    metric = METRICS.get(str(row["metric"]))
    if metric is None or metric.better is None:
        return "neutral"
    delta = delta_of(row, base)
    evidence = []
    if is_number(row.get("delta_low")) and is_number(row.get("delta_high")):
        evidence.append(row["delta_low"] > 0 or row["delta_high"] < 0)
    if is_number(row.get("p_value")):
        evidence.append(row["p_value"] < 0.05)
    if not delta or not evidence or not all(evidence):
        return "unclear"
    return "better" if (delta < 0) == (metric.better == "lower") else "worse"


def number(value: object) -> str:
    """A figure short enough for a table: 0.034, 0.24, 12.1, 1,234; a dash where there is none."""
    if not is_number(value):
        return "–"
    size = abs(value)
    if size < 0.1:
        digits = 2 if size == 0 else 3 if size >= 0.0005 else 4
        text = f"{size:.{digits}f}" if size == 0 or size >= 0.00005 else f"{size:.0e}"
    elif size < 9.995:
        text = f"{size:.2f}"
    else:
        text = f"{size:.1f}" if size < 99.95 else f"{size:,.0f}"
    return f"−{text}" if value < 0 else text


def signed(value: object) -> str:
    """A difference with its sign always written."""
    text = number(value)
    return f"+{text}" if is_number(value) and value > 0 else text


def percent(share: float) -> str:
    """A level for a reader: 95 %, 99.9 %."""
    return f"{100 * share:.6g} %"


def p_text(value: object) -> str:
    """A p-value as it is written in a paper; empty where there is none."""
    if not is_number(value):
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def arrow(delta: float | None) -> str:
    """The direction of a difference, for readers without the colours."""
    return "" if delta is None else "▲" if delta > 0 else "▼" if delta < 0 else "="


def headline_line(lines: Sequence[Line], arm: str | None) -> Line | None:
    """The line that speaks for a run: the first risk metric, by a judge that did not filter the pairs.

    A judge that filtered speaks only where no other did. Lines without both base and arm do not count.
    """
    usable = [
        line
        for line in lines
        if arm in line.cells
        and "base" in line.cells
        and all(is_number(line.cells[name].get("value")) for name in ("base", arm))
    ]
    known = [line for line in usable if is_risk(line.metric)]
    # No risk metric that we know: the unknown ones may be it, and are reported without a verdict.
    candidates = known or [line for line in usable if line.metric not in METRICS]
    held_out = [line for line in candidates if not line.filtered]
    return next(iter(held_out or candidates), None)
