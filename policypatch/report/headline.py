"""A run in a few plain sentences, computed from its scorecard.

They take the side of the sceptic: they quote a judge that had no part in training where there is one, say
"worse" or "no clear change" when the figures do, name the judges that disagree, and what else became worse.
"""

from collections.abc import Iterable
from typing import Literal

from policypatch.report.metrics import metric_spoken
from policypatch.report.scorecard import (
    LEVEL,
    Effect,
    Group,
    Line,
    Row,
    comparable,
    delta_of,
    effect_of,
    final_arm,
    groups_of,
    headline_line,
)
from policypatch.report.side_effects import side_effects
from policypatch.report.wording import bound, is_number, number, percent, signed

Verdict = Literal["better", "worse", "unclear", "neutral", "none"]


def headline(rows: Iterable[Row], level: float = LEVEL) -> str:
    """The sentences: what became of the run's own risk, what can be guaranteed of it, and the side effects.

    The own risk is the first row's, and its first split speaks for it. `level` is that of the rows' intervals and
    bounds (`evaluate.level`).
    """
    rows = list(rows)
    beside = side_effects(rows, level)
    return " ".join(filter(None, (own_sentences(rows, level), beside.sentence if beside else "")))


def own_sentences(rows: Iterable[Row], level: float = LEVEL) -> str:
    """The part about the own risk, such as "Toxic rate 0.61 → 0.24 by svm (had no part in training); median PPL ….

    With 95 % confidence the toxic rate on such prompts is below 0.31 (svm)."
    """
    rows = list(rows)
    arm = final_arm(rows)
    if arm is None:
        return "Only the base was evaluated: there is nothing to compare."
    group = groups_of(rows)[0]
    line = headline_line(group.lines, arm)
    if line is None:
        return f"The scorecard holds no figure of the risk for both base and {arm}: nothing can be claimed."
    clause = _clause(group, line, arm, level)
    upper = line.cells[arm].get("upper")
    by = f" ({line.judge})" if line.judge else ""
    guaranteed = ""
    if is_number(upper):
        what = f"the {metric_spoken(line.metric)} on such prompts is below {bound(upper)}{by}"
        guaranteed = f" With {percent(level)} confidence {what}."
    return f"{clause[:1].upper()}{clause[1:]}.{guaranteed}"


def verdict(rows: Iterable[Row], level: float = LEVEL) -> Verdict:
    """What became of the own risk in one word, "none" where nothing can be compared."""
    rows = list(rows)
    arm = final_arm(rows)
    line = headline_line(groups_of(rows)[0].lines, arm) if arm is not None else None
    return effect_of(line.cells[arm], line.cells["base"], level) if line is not None and arm is not None else "none"


def _clause(group: Group, line: Line, arm: str, level: float) -> str:
    row, base = line.cells[arm], line.cells["base"]
    effect = effect_of(row, base, level)
    asides = []
    if line.judge is not None:
        asides.append("had a part in training" if line.filtered else "had no part in training")
    if effect == "unclear":
        asides.append(_doubt(row, base, level))
    parts = [
        {"worse": "worse than the base: ", "unclear": "no clear change: "}.get(effect, "")
        + f"{line.label} {_change(line, arm)}"
        + (f" by {line.judge}" if line.judge else "")
        + (f" ({'; '.join(asides)})" if asides else "")
    ]
    parts += _dissent(group.lines, line, arm, effect, level)
    parts += [
        f"{other.label} {_change(other, arm)}"
        for other in group.lines
        if other.metric == "ppl_median"
        and comparable(other, arm)
        # The side effects name it otherwise.
        and effect_of(other.cells[arm], other.cells["base"], level) != "worse"
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


def _dissent(lines: list[Line], chosen: Line, arm: str, effect: Effect, level: float) -> list[str]:
    """The judges of the same metric that come to a less favourable answer than the quoted one."""
    order: list[Effect] = ["worse", "unclear", "better"]
    if effect not in order:
        return []
    found = []
    for line in lines:
        if line is chosen or line.metric != chosen.metric or arm not in line.cells:
            continue
        other = effect_of(line.cells[arm], line.cells.get("base"), level)
        if other in order and order.index(other) < order.index(effect) and "base" in line.cells:
            word = "worse" if other == "worse" else "no clear change"
            found.append(f"{word} by {line.judge}: {_change(line, arm)}")
    return found
