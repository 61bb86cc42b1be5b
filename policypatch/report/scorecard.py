"""What the rows of a scorecard mean: order, own risk and others, evidence, and which arm and judge speak for a run.

All views of a scorecard, the page, the headline and the terminal table, read it through here, so that they cannot
disagree about what counts as better.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from policypatch.evaluate.scorecard import COST
from policypatch.report.metrics import METRICS, is_risk, metric_label, metric_rank
from policypatch.report.wording import is_number

Row = Mapping[str, Any]
Effect = Literal["better", "worse", "unclear", "neutral"]

LEVEL = 0.95  # of the intervals, where the config does not say
UTILITY = "utility"  # what is no risk: the rows under this name stand last
_FIRST_ARMS, _LAST_ARMS = ("base", "sft"), ("patch", "teacher")


@dataclass
class Line:
    """One metric by one judge: a row of the table, with one scorecard row for each arm."""

    metric: str
    judge: str | None
    filtered: bool  # it had a part in training
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
        return " · ".join(part for part in (readable(self.risk), readable(self.split)) if part)


def readable(name: str) -> str:
    """A risk or split for a reader."""
    return name.replace("_", " ")


def arms_of(rows: Iterable[Row]) -> list[str]:
    """The arms in the order of their columns: base, sft, any others as they came, patch, teacher."""
    seen = list(dict.fromkeys(str(row["arm"]) for row in rows))
    others = [arm for arm in seen if arm not in _FIRST_ARMS + _LAST_ARMS]
    return [arm for arm in (*_FIRST_ARMS, *others, *_LAST_ARMS) if arm in seen]


def final_arm(rows: Iterable[Row]) -> str | None:
    """The arm that the run is about: the patch, or else the last one that is not the base, the teacher's if alone."""
    compared = [arm for arm in arms_of(rows) if arm != "base"]
    return next((arm for arm in reversed(compared) if arm != "teacher"), next(iter(compared), None))


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """The rows arranged as a table: a group for each risk and split, headline metrics first.

    The first row's risk, which the run is about, comes first, utility last. Within a metric a judge that did not
    filter the training pairs comes before one that did.
    """
    found = _grouped(row for row in rows if row.get("risk") != COST)
    for group in found:
        group.lines.sort(key=lambda line: (metric_rank(line.metric), line.metric, line.filtered))
    risks = list(dict.fromkeys(group.risk for group in found))
    order = risks[:1] + sorted(risks[1:], key=lambda risk: risk == UTILITY)
    return sorted(found, key=lambda group: order.index(group.risk))


def costs_of(rows: Iterable[Row]) -> list[Group]:
    """What the arms cost: a group for training and one for each load that they answered."""
    return _grouped(row for row in rows if row.get("risk") == COST)


def _grouped(rows: Iterable[Row]) -> list[Group]:
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
    return list(groups.values())


def unjudged(rows: Iterable[Row]) -> list[str]:
    """A sentence for each judge that failed on texts, in order of appearance."""
    failed: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        if row.get("unjudged"):
            failed[str(row["judge"]), str(row["arm"]), str(row.get("risk")), str(row.get("split"))] = row["unjudged"]
    judges = dict.fromkeys(judge for judge, *_ in failed)
    counts = {judge: sum(n for (by, *_), n in failed.items() if by == judge) for judge in judges}
    return [f"{judge} failed on {n} text{'s' if n > 1 else ''}, left out" for judge, n in counts.items()]


def own_and_others(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """The groups of the risk that the run is about, and those of all else."""
    risk = groups[0].risk if groups else ""
    return [group for group in groups if group.risk == risk], [group for group in groups if group.risk != risk]


def by_risk(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """The groups under the reader's name of their risk."""
    risks = dict.fromkeys(group.risk for group in groups)
    return [(readable(risk), [group for group in groups if group.risk == risk]) for risk in risks]


def delta_of(row: Row, base: Row | None) -> float | None:
    """The difference to the base: as given, or else from the two values; nothing where only rounding is left of it."""
    if is_number(row.get("delta")):
        delta = float(row["delta"])
    elif base is not None and is_number(row.get("value")) and is_number(base.get("value")):
        delta = float(row["value"]) - float(base["value"])
    else:
        return None
    return 0.0 if abs(delta) < 1e-12 else delta


def evidence_of(row: Row, level: float = LEVEL) -> list[bool]:
    """Whether the interval of the paired difference and the paired test, where they are given, tell it from 0."""
    evidence = []
    if is_number(row.get("delta_low")) and is_number(row.get("delta_high")):
        evidence.append(row["delta_low"] > 0 or row["delta_high"] < 0)
    if is_number(row.get("p_value")):
        evidence.append(row["p_value"] < round(1 - level, 12))  # 1 - 0.95 is a little more than 0.05
    return evidence


def effect_of(row: Row, base: Row | None, level: float = LEVEL) -> Effect:
    """Whether the arm is better than the base: a claim only where all the evidence given bears it out.

    The evidence is the interval of the paired difference and the paired test; with neither, or with
    either against it, the answer is "unclear". A metric without a good direction is "neutral". Where values near
    one half are good, a change may overshoot: the whole interval must lie nearer to it than the base, or further off.
    """
    metric = METRICS.get(str(row["metric"]))
    if metric is None or metric.better is None:
        return "neutral"
    delta = delta_of(row, base)
    evidence = evidence_of(row, level)
    if not delta or not evidence or not all(evidence):
        return "unclear"
    if metric.better != "half":
        return "better" if (delta < 0) == (metric.better == "lower") else "worse"
    return _nearer(row, base, delta)


def _nearer(row: Row, base: Row | None, delta: float) -> Effect:
    if base is None or not is_number(base.get("value")):
        return "unclear"
    ends = [row[key] if is_number(row.get(key)) else delta for key in ("delta_low", "delta_high")]
    before = abs(base["value"] - 0.5)
    values = [base["value"] + end - 0.5 for end in (*ends, delta)]
    if all(abs(value) < before for value in values):
        return "better"
    one_side = min(values) > 0 or max(values) < 0
    return "worse" if one_side and all(abs(value) > before for value in values) else "unclear"


def headline_line(lines: Sequence[Line], arm: str | None) -> Line | None:
    """The line that speaks for a run: the first risk metric, by a judge that had no part in training.

    One that had speaks only where no other had none. Lines without both base and arm do not count.
    """
    usable = [line for line in lines if comparable(line, arm)]
    known = [line for line in usable if is_risk(line.metric)]
    # No risk metric that we know: the unknown ones may be it, and are reported without a verdict.
    candidates = known or [line for line in usable if line.metric not in METRICS]
    held_out = [line for line in candidates if not line.filtered]
    return next(iter(held_out or candidates), None)


def comparable(line: Line, arm: str | None) -> bool:
    """Whether the line has a figure of both the base and the arm."""
    return all(name in line.cells and is_number(line.cells[name].get("value")) for name in ("base", str(arm)))
