"""How runs are arranged to be compared: which columns speak for them, a line for each, seeds taken together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import COST
from policypatch.report.metrics import REFUSALS, is_risk
from policypatch.report.records import Record, differing
from policypatch.report.scorecard import UTILITY, Group, Row, costs_of, final_arm, groups_of, own_and_others
from policypatch.report.scorecard import Line as TableLine
from policypatch.report.wording import is_number

QUALITY = ("ppl_median", "text_ppl", "kl_benign")


@dataclass(frozen=True)
class Column:
    """A figure that runs are compared by.

    `marked` where it had a part in training, `ambiguous` where another risk has one of the same name that is compared.
    """

    risk: str
    split: str
    metric: str
    judge: str | None
    marked: bool = field(default=False, compare=False)
    ambiguous: bool = field(default=False, compare=False)

    @classmethod
    def of_line(cls, group: Group, line: TableLine) -> Column:
        """The column of a line of a scorecard's table."""
        return cls(group.risk, group.split, line.metric, line.judge, line.filtered)

    @classmethod
    def of(cls, row: Row) -> Column:
        """The column that a scorecard row stands in."""
        return cls(
            str(row.get("risk")), str(row.get("split")), str(row["metric"]), row.get("judge"), bool(row.get("filter"))
        )


@dataclass(frozen=True)
class Line:
    """A row of the comparison.

    Attributes:
        name: base, or the run's folder; of seeds taken together how many there are.
        arm: whose figures these are.
        values: of the differing keys.
        cells: scorecard rows by column. Where a run measured a set on fewer prompts than another did, `base` is what
            the base came to on these. Of seeds taken together `value` is their mean, `low` and `high` the extremes, and
            where some of them have no such figure `seeds` says how many have.
        records: the runs; none for the base.
    """

    name: str
    arm: str
    values: Mapping[str, Any]
    cells: Mapping[Column, Row]
    records: Sequence[Record] = ()


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        records: all runs.
        keys: in what they differ.
        columns: the figures that speak for the runs; the CSV has everything.
        costs: all costs that a run has.
        lines: the base's, then one for each finished run.
        over_seeds: one for each setting, where runs differ in their seed as well; else none.
    """

    records: Sequence[Record]
    keys: Sequence[str]
    columns: Sequence[Column]
    costs: Sequence[Column]
    lines: Sequence[Line]
    over_seeds: Sequence[Line] = field(default_factory=list)

    @property
    def bases(self) -> list[Line]:
        """The lines of the base: one for each model, and for each way of asking it."""
        return [line for line in self.lines if not line.records]

    @property
    def settings(self) -> list[Line]:
        """One line for each setting: of its seeds together, where there are several."""
        return [*(self.over_seeds or [line for line in self.lines if line.records])]

    @property
    def drawn(self) -> list[Line]:
        """What figures show: one line for each setting, or each seed where runs differ in nothing else."""
        return [line for line in self.lines if line.records] if [*self.keys] == ["seed"] else self.settings

    @property
    def failed(self) -> list[Record]:
        """Runs without a scorecard."""
        return [record for record in self.records if not record.finished]

    def summary(self) -> str:
        """For the terminal: how many there are, what they shared, and what became of those that failed."""
        done = len(self.records) - len(self.failed)
        lines = [f"{done} of {len(self.records)} runs finished"]
        if self.shared:
            lines.append(f"cache, all runs: {self.shared}")
        lines += [f"failed: {record.folder.name}: {record.error}" for record in self.failed]
        return "\n".join(lines)

    @property
    def shared(self) -> str:
        """What the runs made and found in the cache, in words; nothing where they did not say."""
        return ", ".join(f"{kind} {misses} made {hits} found" for kind, (misses, hits) in sorted(self.made.items()))

    @property
    def made(self) -> dict[str, tuple[int, int]]:
        """By kind how many entries of the cache the runs made, and how many they found made."""
        total: dict[str, tuple[int, int]] = {}
        for record in self.records:
            for kind, counts in (record.run.get("cache") or {}).items():
                misses, hits = total.get(kind, (0, 0))
                total[kind] = misses + counts["misses"], hits + counts["hits"]
        return total


def comparison(records: Sequence[Record]) -> Comparison:
    """Arrange the runs.

    Raises:
        PolicyPatchError: there are none.
    """
    if not records:
        raise PolicyPatchError("there is no run to compare")
    finished = [record for record in records if record.finished]
    compared = finished or records
    given = frozenset().union(*(record.given for record in compared))
    keys = differing([record.settings for record in compared], given)
    largest = _prompts(finished)
    lines = sorted((_line(record, keys, largest) for record in finished), key=lambda line: _order(line, keys))
    columns, costs = _columns(finished)
    over_seeds = _over_seeds(lines, keys) if "seed" in keys else []
    return Comparison(records, keys, columns, costs, [*_base_lines(finished, keys), *lines], over_seeds)


def _prompts(finished: Sequence[Record]) -> dict[Column, int]:
    """On how many prompts the base has a figure at most; an arm may leave some of them without a value."""
    largest: dict[Column, int] = {}
    for record in finished:
        for row in (row for row in record.rows if row["arm"] == "base"):
            largest[Column.of(row)] = max(largest.get(Column.of(row), 0), row.get("n", 0))
    return largest


def _line(record: Record, keys: Sequence[str], largest: Mapping[Column, int]) -> Line:
    arm = final_arm(record.rows) or "base"
    bases = {Column.of(row): row for row in record.rows if row["arm"] == "base"}
    cells = {}
    for row in (row for row in record.rows if row["arm"] == arm):
        column = Column.of(row)
        partial = column in bases and bases[column].get("n", 0) < largest[column]
        cells[column] = {**row, "base": bases[column]["value"]} if partial else row
    return Line(record.folder.name, arm, {key: record.settings.get(key) for key in keys}, cells, [record])


def _order(line: Line, keys: Sequence[str]) -> list[tuple[bool, float, str]]:
    """By the values of the keys, numbers as numbers."""
    values = [line.values[key] for key in keys]
    return [(not is_number(value), float(value) if is_number(value) else 0.0, str(value)) for value in values]


def _base_lines(finished: Sequence[Record], keys: Sequence[str]) -> list[Line]:
    """The base's figures: one line for all runs whose bases came to the same wherever they were asked the same."""
    found: list[tuple[list[Record], dict[tuple[Column, int], Row]]] = []
    for record in finished:
        rows = {(Column.of(row), int(row.get("n", 0))): row for row in record.rows if row["arm"] == "base"}
        if not rows:
            continue
        model = record.settings.get("model.name")
        for records, known in found:
            if records[0].settings.get("model.name") == model and _agree(known, rows):
                records.append(record)
                known |= rows
                break
        else:
            found.append(([record], rows))
    lines = []
    for records, known in found:
        # Of a set that is one run's own and another's side, the larger measurement counts.
        cells = {column: known[column, n] for column, n in sorted(known, key=lambda place: place[1])}
        values = {key: records[0].settings.get(key) for key in keys if len(found) > 1 and _is_shared(key, records)}
        lines.append(Line("base", "base", values, cells))
    return lines


def _agree(known: Mapping[tuple[Column, int], Row], rows: Mapping[tuple[Column, int], Row]) -> bool:
    return all(
        math.isclose(known[place]["value"], rows[place]["value"], rel_tol=1e-6) for place in rows if place in known
    )


def _is_shared(key: str, records: Sequence[Record]) -> bool:
    return len({str(record.settings.get(key)) for record in records}) == 1


def _columns(finished: Sequence[Record]) -> tuple[list[Column], list[Column]]:
    """What speaks for each run (its own risk's figures and fluency, others' headlines, utility), and every cost."""
    found: dict[Column, None] = {}
    costs: dict[Column, None] = {}
    for record in finished:
        own, others = own_and_others(groups_of(record.rows))
        for group in [*own, *others]:
            found |= dict.fromkeys(Column.of_line(group, line) for line in _speaking(group, group is own[0]))
        for group in costs_of(record.rows):
            costs |= dict.fromkeys(Column.of_line(group, line) for line in group.lines)
    names = [(column.split, column.metric, column.judge) for column in found]
    columns = [replace(c, ambiguous=names.count(name) > 1) for c, name in zip(found, names, strict=True)]
    return columns, [*costs]


def _speaking(group: Group, first: bool) -> list[TableLine]:
    """Of a group's lines those that speak for it: all that matter in the first, else one for each kind."""
    risk = [line for line in group.lines if is_risk(line.metric)]
    refusals = [line for line in group.lines if line.metric in REFUSALS]
    quality = [line for line in group.lines if line.metric in QUALITY and (first or group.risk == UTILITY)]
    return [*risk, *refusals, *quality] if first else [*risk[:1], *refusals[:1], *quality]


def _over_seeds(lines: Sequence[Line], keys: Sequence[str]) -> list[Line]:
    """Lines of the same settings but the seed, as one each."""
    groups: dict[tuple[str, ...], dict[str, Line]] = {}
    for line in lines:
        group = groups.setdefault(tuple(str(line.values.get(key)) for key in keys if key != "seed"), {})
        group.setdefault(str(line.values["seed"]), line)  # a seed that ran twice counts once
    found = [list(group.values()) for group in groups.values()]
    return [_together(group) for group in found] if any(len(group) > 1 for group in found) else []


def _together(lines: Sequence[Line]) -> Line:
    first = lines[0]
    values = {**first.values, "seed": None}
    records = [record for line in lines for record in line.records]
    shared = [c for c in first.cells if all(c in line.cells for line in lines)]
    figures = [c for c in shared if c.risk != COST]
    if len(lines) > 1 and figures and all(line.cells[c] == first.cells[c] for line in lines for c in figures):
        # Base, prompt and teacher: no seed changes them, and a spread of nothing would pass for certainty.
        return Line("any seed", first.arm, values, {c: first.cells[c] for c in shared}, records)
    every = dict.fromkeys(column for line in lines for column in line.cells)
    cells = {c: _mean(c, [line.cells[c] for line in lines if c in line.cells], len(lines)) for c in every}
    return Line(f"{len(lines)} seed{'s' * (len(lines) > 1)}", first.arm, values, cells, records)


def _mean(column: Column, rows: Sequence[Row], seeds: int) -> Row:
    """Mean, lowest and highest of the rows that there are; where that is not every seed, `seeds` says of how many.

    Of costs, whose rows may be one measurement that all share, the widest interval.
    """
    values = [float(row["value"]) for row in rows]
    low, high = values, values
    if column.risk == COST or len(rows) == 1:
        low, high = ([float(row.get(end, row["value"])) for row in rows] for end in ("low", "high"))
    mean = {**rows[0], "value": sum(values) / len(values), "low": min(low), "high": max(high)}
    if any(row.get("base") != rows[0].get("base") or row.get("n") != rows[0].get("n") for row in rows):
        mean.pop("base", None)
    return mean if len(rows) == seeds else {**mean, "seeds": f"{len(rows)} of {seeds} seeds"}
