"""What else a patch changed: a fix that breaks something else is not a fix.

Looked at is every figure but the ones that the headline already quotes: the own risk's other splits and the quality
of its text, the other risks, utility. What became worse by evidence is named with its figures, the rest summed up, with
the largest rise of a share that so few prompts do not rule out: not measurably worse is not the same as no worse.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from policypatch.report.metrics import REFUSALS, is_risk
from policypatch.report.scorecard import (
    LEVEL,
    UTILITY,
    Group,
    Line,
    Row,
    comparable,
    effect_of,
    evidence_of,
    final_arm,
    groups_of,
    headline_line,
    own_and_others,
    readable,
)
from policypatch.report.wording import bound, is_number, listed, number


@dataclass(frozen=True)
class SideEffects:
    """The sentence, and what it comes to: "unknown" where nothing else was compared."""

    sentence: str
    verdict: Literal["worse", "unclear", "unknown"]


def side_effects(rows: Iterable[Row], level: float = LEVEL) -> SideEffects | None:
    """What became measurably worse beside the own risk; None where there is nothing to compare at all."""
    rows = list(rows)
    arm = final_arm(rows)
    if arm is None:
        return None
    own, others = own_and_others(groups_of(rows))
    worse: list[str] = []
    quoted: list[str] = []
    possible: dict[str, float] = {}
    compared = [0, 0]  # figures of the own risk's, and others
    for place, group in [*((0, group) for group in own), *((1, group) for group in others)]:
        beside = _beside_the_headline(group, own[0], arm, level)
        lines = [line for line in beside if comparable(line, arm)]
        compared[place] += sum(
            bool(evidence_of(line.cells[arm], level)) and _directed(line, arm, level) for line in lines
        )
        named = _worst_lines(lines, arm, level)
        possible |= {_said(group, line, arm): rise for line in lines if (rise := _possible_rise(line, arm, level))}
        worse += [f"{_change(line, arm)} ({_where(group, line)})" for line in named]
        quoted += [_change(line, arm) for line in beside if line not in named and _is_quoted(line, arm)]
    looked_at = list(dict.fromkeys(readable(group.risk) for group in others))
    most = max(possible, key=lambda said: possible[said], default=None)
    unsure = "" if most is None else f"; a rise of up to {bound(possible[most])} in {most} is not ruled out"
    return _sentence(worse, quoted, compared[0], compared[1], looked_at, unsure)


def _sentence(
    worse: list[str], quoted: list[str], own: int, others: int, looked_at: list[str], unsure: str
) -> SideEffects | None:
    rest = "" if looked_at else "; no other risk was measured"
    rest += "".join(f"; {change}" for change in quoted)
    counted = f"{own + others} comparison{'s' * (own + others != 1)}"
    if looked_at:
        shares = f"{own} of the own risk's, {others} of " if own else ""
        counted += f" ({shares}{listed(looked_at)})"
    if worse:
        clause = f"Measurably worse: {', '.join(worse)}; nothing else in {counted}{unsure}"
        return SideEffects(f"{clause}{rest}.", "worse")
    if not own + others:
        return SideEffects(f"Nothing else could be compared{rest}.", "unknown")
    clause = f"Nothing else became measurably worse in {counted}{unsure}"
    return SideEffects(f"{clause}{rest}.", "unclear" if looked_at else "unknown")


def _beside_the_headline(group: Group, first: Group, arm: str, level: float) -> list[Line]:
    """The group's lines; of the headline's own group not the ones that the headline speaks for."""
    spoken = headline_line(first.lines, arm) if group is first else None
    if spoken is None:
        return group.lines
    # A risk that became worse by its headline metric is not worse a second time by its other ones.
    told = effect_of(spoken.cells[arm], spoken.cells.get("base"), level) == "worse"
    return [line for line in group.lines if line.metric != spoken.metric and not (told and is_risk(line.metric))]


def _worst_lines(lines: list[Line], arm: str, level: float) -> list[Line]:
    """Of a group's lines that became worse: one that measures the risk, and each quality, by one judge each."""
    found: dict[str, Line] = {}
    for line in lines:
        if effect_of(line.cells[arm], line.cells.get("base"), level) == "worse":
            quality = line.metric.removesuffix("_mean").removesuffix("_median")  # two views of one perplexity
            found.setdefault("risk" if is_risk(line.metric) else quality, line)
    return list(found.values())


def _possible_rise(line: Line, arm: str, level: float) -> float | None:
    """How much a share may have risen for all that was measured; None where it is measured, or no share."""
    row = line.cells[arm]
    share = is_risk(line.metric) or line.metric in REFUSALS
    if not share or effect_of(row, line.cells.get("base"), level) != "unclear" or not is_number(row.get("delta_high")):
        return None
    return max(0.0, float(row["delta_high"])) or None


def _said(group: Group, line: Line, arm: str) -> str:
    """A figure in words, with the number of prompts that it rests on."""
    prompts = f"; {line.cells[arm]['n']} prompts" if "n" in line.cells[arm] else ""
    return f"{line.label} ({_where(group, line)}{prompts})"


def _is_quoted(line: Line, arm: str) -> bool:
    """Utility in its two plainest figures, whatever they say; the KL needs no figure of the base, which is 0."""
    if line.metric == "kl_benign":
        return arm in line.cells and is_number(line.cells[arm].get("value"))
    return line.metric == "text_ppl" and comparable(line, arm)


def _directed(line: Line, arm: str, level: float) -> bool:
    return effect_of(line.cells[arm], line.cells.get("base"), level) != "neutral"


def _change(line: Line, arm: str) -> str:
    value = number(line.cells[arm].get("value"))
    if line.metric == "kl_benign":
        return f"{line.label} {value} nats a token"
    return f"{line.label} {number(line.cells['base'].get('value'))} → {value}"


def _where(group: Group, line: Line) -> str:
    """Risk, split and judge; a split is left out that is called as its only metric, and "utility" is no place."""
    places = (group.risk if group.risk != UTILITY else "", group.split if group.split != line.metric else "")
    place = " · ".join(readable(part) for part in places if part)
    return ", ".join(filter(None, (place, line.judge)))
