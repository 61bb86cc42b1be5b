"""A run in one plain sentence, computed from its scorecard.

The sentence takes the side of the sceptic: it quotes a judge that did not filter the training pairs
where there is one, says "worse" or "no clear change" when the figures do, and names the judges that
disagree.
"""

from collections.abc import Iterable
from typing import Literal

from policypatch.report.scorecard import (
    LEVEL,
    Effect,
    Group,
    Line,
    Row,
    delta_of,
    effect_of,
    final_arm,
    groups_of,
    headline_line,
    is_number,
    number,
    percent,
    signed,
)

Verdict = Literal["better", "worse", "unclear", "neutral", "none"]


def headline(rows: Iterable[Row], level: float = LEVEL) -> str:
    """The sentence, such as "Toxic rate 0.61 → 0.24 by svm (did not filter the pairs); median PPL …".

    A scorecard of several risks gets one clause for each, on the first split of each. `level` is
    that of the rows' intervals (`evaluate.level`).
    """
    rows = list(rows)
    arm = final_arm(rows)
    if arm is None:
        return "Only the base was evaluated: there is nothing to compare."
    clauses = [clause for group in _first_splits(rows) if (clause := _clause(group, arm, level))]
    if not clauses:
        return f"The scorecard holds no figure of the risk for both base and {arm}: nothing can be claimed."
    return "; ".join(clause[:1].upper() + clause[1:] if not i else clause for i, clause in enumerate(clauses))


def verdict(rows: Iterable[Row]) -> Verdict:
    """The headline in one word: the worst over the risks, "none" where nothing can be compared."""
    rows = list(rows)
    arm = final_arm(rows)
    effects: list[Effect] = []
    for group in _first_splits(rows):
        line = headline_line(group.lines, arm)
        if line is not None and arm is not None:
            effects.append(effect_of(line.cells[arm], line.cells["base"]))
    for effect in ("worse", "unclear", "neutral", "better"):
        if effect in effects:
            return effect
    return "none"


def _first_splits(rows: list[Row]) -> list[Group]:
    first: dict[str, Group] = {}
    for group in groups_of(rows):
        first.setdefault(group.risk, group)
    return list(first.values())


def _clause(group: Group, arm: str, level: float) -> str:
    line = headline_line(group.lines, arm)
    if line is None:
        return ""
    row, base = line.cells[arm], line.cells["base"]
    effect = effect_of(row, base)
    asides = []
    if line.judge is not None:
        asides.append("also filtered the pairs" if line.filtered else "did not filter the pairs")
    if effect == "unclear":
        asides.append(_doubt(row, base, level))
    parts = [
        {"worse": "worse than the base: ", "unclear": "no clear change: "}.get(effect, "")
        + f"{line.label} {_change(line, arm)}"
        + (f" by {line.judge}" if line.judge else "")
        + (f" ({'; '.join(asides)})" if asides else "")
    ]
    parts += _dissent(group.lines, line, arm, effect)
    parts += [
        f"{other.label} {_change(other, arm)}"
        for other in group.lines
        if other.metric == "ppl_median" and arm in other.cells and "base" in other.cells
    ]
    return "; ".join(parts)


def _change(line: Line, arm: str) -> str:
    return f"{number(line.cells['base'].get('value'))} → {number(line.cells[arm].get('value'))}"


def _doubt(row: Row, base: Row, level: float) -> str:
    low, high = row.get("delta_low"), row.get("delta_high")
    if is_number(low) and is_number(high):
        interval = f"{percent(level)} interval {signed(low)} to {signed(high)}"
        between = f"difference {signed(delta_of(row, base))}, {interval}"
        return between if low <= 0 <= high else f"{between}, p = {number(row.get('p_value'))}"
    return "difference within chance" if is_number(row.get("p_value")) else "difference not tested"


def _dissent(lines: list[Line], chosen: Line, arm: str, effect: Effect) -> list[str]:
    """The judges of the same metric that come to a less favourable answer than the quoted one."""
    order: list[Effect] = ["worse", "unclear", "better"]
    if effect not in order:
        return []
    found = []
    for line in lines:
        if line is chosen or line.metric != chosen.metric or arm not in line.cells:
            continue
        other = effect_of(line.cells[arm], line.cells.get("base"))
        if other in order and order.index(other) < order.index(effect) and "base" in line.cells:
            word = "worse" if other == "worse" else "no clear change"
            found.append(f"{word} by {line.judge}: {_change(line, arm)}")
    return found
