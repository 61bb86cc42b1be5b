"""What `interference.py` compares: one stack less another, prompt by prompt, over the runs of a sweep over seeds.

Values are averaged over seeds, and tests and intervals are over prompts. Each function but `closed` gives lines with
`one`, `other`, `figure`, `difference` and `differs`, that of one less the other; Holm's correction is over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from policypatch.evaluate.drift import holm
from policypatch.evaluate.kept import kept
from policypatch.evaluate.measure import Settings
from policypatch.evaluate.scorecard import COST
from policypatch.evaluate.statistics import Difference, paired_difference

BASE, ALPHA = "base", 0.05
PERMUTATIONS = 99_999
"""Of hundreds of tests Holm's first threshold is 0.0002: with fewer draws no p-value could be below it."""
Run = Sequence[Mapping[str, Any]]
"""A run's scorecard, or its values prompt by prompt."""
Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Column:
    """A figure."""

    risk: str
    metric: str
    judge: str | None
    title: str
    split: str | None = None  # the set, where it is not the first that has the figure

    @property
    def own(self) -> str | None:
        """What the patch is called whose effect or price it is: the risk. None of utility and costs: all have them."""
        return None if self.metric in UTILITY or self.risk == COST else self.risk

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a scorecard's row, or a line of values, is this figure."""
        known = (row["risk"], row["metric"], row["judge"]) == (self.risk, self.metric, self.judge)
        return known and self.split in (None, row["split"])


COLUMNS = (
    Column("toxicity", "toxic_rate", "svm", "toxic rate (svm)"),
    Column("toxicity", "amt", "svm", "AMT (svm)"),
    Column("gender_bias", "gas", "names", "GAS (names)"),
    Column("gender_bias", "gas", "names", "GAS, WinoBias", "winobias"),
    Column("harmfulness", "asr", "refusal", "ASR (refusal)"),
    Column("harmfulness", "asr", "likelihood", "ASR (likelihood)"),
    Column("harmfulness", "over_refusal", "refusal", "over-refusal"),
    Column("harmfulness", "benign_refusal", "refusal", "benign refusal"),
    Column("digits", "hit_rate", "policy", "digits"),
    Column("quotes", "hit_rate", "policy", "quotes"),
    Column("first_person", "hit_rate", "policy", "first person"),
    Column("toxicity", "ppl_median", "gemma-3-270m", "median PPL"),
    Column("utility", "kl_benign", None, "KL, benign"),
    Column("utility", "text_ppl", None, "text PPL"),
    Column(COST, "first_token_ratio", None, "first token, x base"),
    Column(COST, "per_token_ratio", None, "further token, x base"),
)
RISKS = ("toxic_rate", "amt", "gas", "asr", "hit_rate")  # figures of a risk itself
UTILITY = ("kl_benign", "ppl_median", "text_ppl")


def parts(arm: str) -> list[str]:
    """The patches of a stack, the one nearest to the prompt last."""
    return arm.split("+")


def arms_of(cards: Sequence[Run]) -> list[str]:
    """Those that all runs have."""
    shared = [{row["arm"] for row in card} for card in cards]
    return [arm for arm in dict.fromkeys(row["arm"] for row in cards[0]) if all(arm in known for known in shared)]


def split_of(cards: Sequence[Run], column: Column) -> str | None:
    """The set that speaks for a figure: the first that has it."""
    return next((one["split"] for one in cards[0] if column.holds(one)), None)


def at(line: Mapping[str, Any], arm: str, column: Column, split: str | None) -> bool:
    """Whether a scorecard's row, or a line of values, is this arm's figure on the set that speaks for it."""
    return line["arm"] == arm and line["split"] == split and column.holds(line)


def seeds_values(values: Sequence[Run], arm: str, column: Column, split: str | None) -> Values | None:
    """(runs, prompts) a figure's values of one arm; None where some run has none."""
    found = [[line["values"] for line in run if at(line, arm, column, split)] for run in values]
    return np.array([of[0] for of in found], dtype=float) if found and all(found) else None


def same_prompts(values: Sequence[Run], other_values: Sequence[Run], column: Column, split: str | None) -> bool | None:
    """Whether the base has the same values of a figure in both sweeps, as on the same prompts; None where none."""
    ours, theirs = (seeds_values(of, BASE, column, split) for of in (values, other_values))
    if ours is None or theirs is None:
        return None
    return ours.shape == theirs.shape and np.allclose(ours, theirs, atol=1e-6, equal_nan=True)


def tested(ours: Values | None, theirs: Values | None, permutations: int = PERMUTATIONS) -> Difference | None:
    """One less another, both (runs, prompts), averaged over runs; None where there is nothing to pair."""
    if ours is None or theirs is None or ours.shape[1:] != theirs.shape[1:]:
        return None
    first, second = ours.mean(0), theirs.mean(0)
    return None if np.isnan(first - second).all() else paired_difference(first, second, permutations=permutations)


def with_holm(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with `differs`, corrected over all of them."""
    told = holm([line["difference"]["p_value"] for line in lines], ALPHA)
    return [line | {"differs": differs} for line, differs in zip(lines, told, strict=True)]


def _compared(cards: Sequence[Run], values: Sequence[Run], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Every figure of these pairs of arms."""
    found = []
    for column in COLUMNS:
        split = split_of(cards, column)
        for one, other in pairs:
            test = tested(*(seeds_values(values, each, column, split) for each in (one, other)))
            if test is not None:
                found.append({"one": one, "other": other, "figure": column.title, "difference": asdict(test)})
    return with_holm(found)


def orders(cards: Sequence[Run], values: Sequence[Run]) -> list[dict[str, Any]]:
    """The same patches in one order and in another.

    Args:
        cards: scorecards of runs that differ in their seed.
        values: their values prompt by prompt.
    """
    both = combinations(arms_of(cards), 2)
    return _compared(cards, values, [(a, b) for a, b in both if sorted(parts(a)) == sorted(parts(b))])


def order_rule(cards: Sequence[Run], values: Sequence[Run]) -> list[dict[str, Any]]:
    """Whether it matters that a risk's own patch stands last, next to the prompt: one contrast for each risk's figure.

    The mean over all stacks of two or more in which it stands last, less that over those in which it stands first.

    Args:
        cards, values: as of `orders`.

    Returns:
        lines with `risk` and, seed by seed, the difference in `each` as well.
    """
    stacks = [arm for arm in arms_of(cards) if len(parts(arm)) > 1]
    found = []
    for column in COLUMNS:
        own = column.own
        ends = [[arm for arm in stacks if parts(arm)[end] == own] for end in (-1, 0)]
        if column.metric not in RISKS or not all(ends):
            continue
        split = split_of(cards, column)
        each = [[seeds_values(values, arm, column, split) for arm in arms] for arms in ends]
        if any(of is None for arms in each for of in arms):
            continue
        last, first = (np.mean([of for of in arms if of is not None], axis=0) for arms in each)
        test = tested(last, first)
        if test is not None:
            line = {"risk": own, "one": f"{own} last", "other": f"{own} first", "figure": column.title}
            by_seed = [float(mean) for mean in np.nanmean(last - first, axis=1)]
            found.append(line | {"difference": asdict(test), "each": by_seed})
    return with_holm(found)


def joint_less_stacks(cards: Sequence[Run], values: Sequence[Run]) -> list[dict[str, Any]]:
    """What stands beside the stacks (a patch that was trained for all risks) less each stack of all patches.

    Args:
        cards, values: as of `orders`.
    """
    arms = [arm for arm in arms_of(cards) if arm != BASE]
    stacks = [arm for arm in arms if len(parts(arm)) > 1]
    stacked = {part for arm in stacks for part in parts(arm)}
    whole = [arm for arm in stacks if set(parts(arm)) == stacked]
    beside = [arm for arm in arms if arm not in stacks and arm not in stacked]
    return _compared(cards, values, [(one, stack) for one in beside for stack in whole])


def growth(cards: Sequence[Run], values: Sequence[Run]) -> list[dict[str, Any]]:
    """Each stack less the same without its last patch, where stacks grow by one patch; none where they are orders.

    Args:
        cards, values: as of `orders`.
    """
    arms = arms_of(cards)
    stacks = [arm for arm in arms if len(parts(arm)) > 1]
    if len({len(parts(arm)) for arm in stacks}) < len(stacks):
        return []
    pairs = [(arm, "+".join(parts(arm)[:-1])) for arm in stacks]
    return _compared(cards, values, [(arm, before) for arm, before in pairs if before in arms])


def across(
    cards: Sequence[Run], values: Sequence[Run], other_cards: Sequence[Run], other_values: Sequence[Run]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Arms of one sweep less those of another: each less that of its name, and stacks less the other's specialist.

    Args:
        cards, values: as of `orders`.
        other_cards, other_values: of the same seeds in the same order.

    Returns:
        the lines, and the figures that were left out because the base has other values there: other prompts, or other
        samples.
    """
    ours, theirs = arms_of(cards), arms_of(other_cards)
    found, left_out = [], []
    for column in COLUMNS:
        split = split_of(cards, column)
        if not (same := same_prompts(values, other_values, column, split)):
            left_out += [column.title] if same is False else []
            continue
        for one, other in _across_pairs(ours, theirs, column.own):
            test = tested(seeds_values(values, one, column, split), seeds_values(other_values, other, column, split))
            if test is not None:
                found.append({"one": one, "other": other, "figure": column.title, "difference": asdict(test)})
    return with_holm(found), left_out


def closed(
    cards: Sequence[Run], values: Sequence[Run], other_cards: Sequence[Run], other_values: Sequence[Run]
) -> list[dict[str, Any]]:
    """What share of a risk's gap in company one sweep's stacks close: (theirs - ours) / (theirs - specialist alone).

    A gap is the mean over all stacks of two or more that hold the risk's specialist, less the other sweep's specialist
    alone. A share has no interval where there is no gap that is told from none, and no line where there is none at all.

    Args:
        cards, values: as of `orders`, of patches that may have closed some of it.
        other_cards, other_values: of those that were trained apart, of the same seeds and prompts.

    Returns:
        lines with `figure`, `stacks` (how many) and `share` (`Kept`, whose `reduction` is the gap).
    """
    shared = set(arms_of(cards)) & set(arms_of(other_cards))
    found = []
    for column in (column for column in COLUMNS if column.metric in RISKS):
        own, split = column.own, split_of(cards, column)
        if own is None or not same_prompts(values, other_values, column, split):
            continue
        stacks = sorted(arm for arm in shared if len(parts(arm)) > 1 and own in parts(arm))
        alone = seeds_values(other_values, own, column, split)
        each = [[seeds_values(of, arm, column, split) for arm in stacks] for of in (values, other_values)]
        if not stacks or alone is None or any(of is None for arms in each for of in arms):
            continue
        ours, theirs = (np.mean([of for of in arms if of is not None], axis=(0, 1)) for arms in each)
        place = {"risk": column.risk, "split": split, "metric": column.metric, "judge": column.judge}
        now, then = _from_to(place, theirs, ours), _from_to(place, theirs, alone.mean(0))
        shares = kept(now, "end", then, "end", RISKS, Settings())
        found += [{"figure": column.title, "stacks": len(stacks), "share": share} for share in shares]
    return found


def _from_to(place: Mapping[str, Any], start: Values, end: Values) -> list[dict[str, Any]]:
    """Values prompt by prompt as `kept` takes them: what a reduction begins with, and what it comes to."""
    return [{"arm": arm, **place, "values": values} for arm, values in ((BASE, start), ("end", end))]


def _across_pairs(ours: Sequence[str], theirs: Sequence[str], specialist: str | None) -> Iterator[tuple[str, str]]:
    for arm in ours:
        if arm != BASE and arm in theirs:
            yield arm, arm
        if specialist in theirs and len(parts(arm)) > 1 and specialist in parts(arm):
            assert specialist is not None
            yield arm, specialist
