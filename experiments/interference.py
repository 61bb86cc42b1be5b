"""What stacks do to each risk, from the runs of +experiment=composition or growth over seeds.

    python experiments/interference.py outputs/composition --out experiments/results/composition [--name matrix]

Writes NAME.json, NAME.png (a heat map) and prints three tables in Markdown. Each cell of the first is the mean over
seeds with smallest and largest, and whether it differs from the patch that is trained against that column's risk,
standing alone, which is called by the risk's name (where a column is no risk of its own, from the base); ? where that
is not among the arms. The second has those differences with their intervals (of perplexities, whose logarithms are
tested, the ratio), the third the same patches in one order and another. Tests and intervals are paired over prompts,
whose values are averaged over seeds, and Holm's correction is over all cells of a column, of the third table over all
orders.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.drift import holm
from policypatch.evaluate.scorecard import COST, PER_PROMPT
from policypatch.evaluate.statistics import Difference, paired_difference
from policypatch.files.atomic import atomic_path, read_json, write_json
from policypatch.report.head_to_head import difference_text
from policypatch.report.records import find_records

BASE, ALPHA = "base", 0.05
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Column:
    """A figure, and what the stacks' values of it are compared with: the specialist's of its risk, else the base's."""

    risk: str
    metric: str
    judge: str | None
    title: str

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a scorecard's row, or a line of values, is this figure."""
        return (row["risk"], row["metric"], row["judge"]) == (self.risk, self.metric, self.judge)


COLUMNS = (
    Column("toxicity", "toxic_rate", "svm", "toxic rate (svm)"),
    Column("gender_bias", "gas", "names", "GAS (names)"),
    Column("harmfulness", "asr", "refusal", "ASR (refusal)"),
    Column("harmfulness", "asr", "likelihood", "ASR (likelihood)"),
    Column("harmfulness", "over_refusal", "refusal", "over-refusal"),
    Column("harmfulness", "benign_refusal", "refusal", "benign refusal"),
    Column("toxicity", "ppl_median", "gemma-3-270m", "median PPL"),
    Column("utility", "kl_benign", None, "KL, benign"),
    Column("utility", "text_ppl", None, "text PPL"),
    Column(COST, "first_token_ratio", None, "first token, x base"),
)
# What a specialist costs, or brings, by itself: of which company takes or adds something.
SPECIALISTS = {
    "asr": "harmfulness",
    "over_refusal": "harmfulness",
    "benign_refusal": "harmfulness",
    "toxic_rate": "toxicity",
    "gas": "gender_bias",
}


@app.command()
def main(
    folders: Annotated[list[Path], typer.Argument(help="sweeps of +experiment=composition or growth over seeds")],
    out: Annotated[Path, typer.Option(help="folder that is written to")],
    name: Annotated[str, typer.Option(help="of the files")] = "matrix",
) -> None:
    """The matrix of stacks and figures."""
    runs = [record for record in find_records(folders) if record.finished]
    if not runs:
        raise PolicyPatchError(f"{folders[0]} holds no finished run: start the sweep again, it goes on")
    cards = [record.rows for record in runs]
    values = [read_json(record.folder / PER_PROMPT) for record in runs]
    seeds = [record.settings["seed"] for record in runs]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise PolicyPatchError(f"seed {twice[0]} has several runs here: give the runs of one sweep over seeds")
    found, ordered = matrix(cards, values), orders(cards, values)
    write_json(out / f"{name}.json", {"seeds": seeds, "rows": found, "orders": ordered})
    with atomic_path(out / f"{name}.png") as temporary:
        drawn(found).savefig(temporary, format="png", dpi=110)
    told = [table(found), differences(found), *([orders_table(ordered)] if ordered else [])]
    Console(soft_wrap=True).print("\n\n".join(told), markup=False, highlight=False)


def matrix(cards: Sequence[Sequence[Mapping[str, Any]]], values: Sequence[Sequence[Mapping[str, Any]]]) -> list[Any]:
    """A row for each arm that all runs have: `stack` and `cells`, by the columns' titles.

    Args:
        cards: scorecards of runs that differ in their seed.
        values: their values prompt by prompt.
    """
    rows: list[dict[str, Any]] = [{"stack": arm, "cells": {}} for arm in _arms(cards)]
    for column in COLUMNS:
        tests: dict[str, Difference] = {}
        split = _split(cards, column)
        against = SPECIALISTS.get(column.metric, BASE)
        for row in rows:
            here = [[one for one in of if _at(one, row["stack"], column, split)] for of in cards]
            if not all(here):
                continue
            each = [float(found[0]["value"]) for found in here]
            compared = None if row["stack"] in (BASE, against) else against
            row["cells"][column.title] = {"mean": float(np.mean(each)), "each": each, "against": compared}
            if compared is None:
                continue
            if (test := _tested(values, row["stack"], compared, column, split)) is not None:
                tests[row["stack"]] = test
        differs = dict(zip(tests, holm([test.p_value for test in tests.values()], ALPHA), strict=True))
        for row in rows:
            if (stack := row["stack"]) in tests:
                row["cells"][column.title] |= {"difference": asdict(tests[stack]), "differs": differs[stack]}
    return rows


def orders(cards: Sequence[Sequence[Mapping[str, Any]]], values: Sequence[Sequence[Mapping[str, Any]]]) -> list[Any]:
    """The same patches in one order and in another: `one`, `other`, `figure`, `difference`, `differs`.

    Args:
        cards: scorecards of runs that differ in their seed.
        values: their values prompt by prompt.
    """
    pairs = [(a, b) for a, b in combinations(_arms(cards), 2) if sorted(a.split("+")) == sorted(b.split("+"))]
    found: list[dict[str, Any]] = []
    for column in COLUMNS:
        split = _split(cards, column)
        for one, other in pairs:
            if (test := _tested(values, one, other, column, split)) is not None:
                found.append({"one": one, "other": other, "figure": column.title, "difference": asdict(test)})
    for line, differs in zip(found, holm([line["difference"]["p_value"] for line in found], ALPHA), strict=True):
        line["differs"] = differs
    return found


def _arms(cards: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Those that all runs have."""
    shared = [{row["arm"] for row in card} for card in cards]
    return [arm for arm in dict.fromkeys(row["arm"] for row in cards[0]) if all(arm in known for known in shared)]


def _split(cards: Sequence[Sequence[Mapping[str, Any]]], column: Column) -> str | None:
    """The set that speaks for a figure: the first that has it."""
    return next((one["split"] for one in cards[0] if column.holds(one)), None)


def _tested(
    values: Sequence[Sequence[Mapping[str, Any]]], arm: str, other: str, column: Column, split: str | None
) -> Difference | None:
    """One arm less another, prompt by prompt; None where some run lacks values of either."""
    ours, theirs = (_mean_values(values, each, column, split) for each in (arm, other))
    return None if ours is None or theirs is None else paired_difference(ours, theirs)


def _at(line: Mapping[str, Any], arm: str, column: Column, split: str | None) -> bool:
    """Whether a scorecard's row, or a line of values, is this arm's figure on the set that speaks for it."""
    return line["arm"] == arm and line["split"] == split and column.holds(line)


def _mean_values(
    values: Sequence[Sequence[Mapping[str, Any]]], arm: str, column: Column, split: str | None
) -> np.ndarray[Any, Any] | None:
    """(prompts,) a figure's values of one arm, averaged over runs; None where some run has none."""
    found = [[line["values"] for line in run if _at(line, arm, column, split)] for run in values]
    return np.array([of[0] for of in found], dtype=float).mean(0) if all(found) else None


def _titles(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [column.title for column in COLUMNS if any(column.title in row["cells"] for row in rows)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: the mean, the smallest and the largest, * where it differs from what it is compared with."""
    titles = _titles(rows)
    lines = [["stack", *titles], ["---"] * (len(titles) + 1)]
    for row in rows:
        lines.append([row["stack"], *(_cell(row["cells"].get(title)) for title in titles)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: what a cell's values are above those that it is compared with (PPL: times), with 95 % intervals."""
    titles = [title for title in _titles(rows) if any("differs" in row["cells"].get(title, {}) for row in rows)]
    lines = [["stack, less what it is compared with", *titles], ["---"] * (len(titles) + 1)]
    for row in rows:
        cells = {title: row["cells"].get(title, {}) for title in titles}
        if any("differs" in cell for cell in cells.values()):
            told = (_interval(cell, title) if "differs" in cell else "–" for title, cell in cells.items())
            lines.append([row["stack"], *told])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def orders_table(found: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: the orders that differ, and how many were compared."""
    lines = [["one order", "less another", "figure", f"difference (of {len(found)} compared)"], ["---"] * 4]
    differing = [line for line in found if line["differs"]]
    lines += [[of["one"], of["other"], of["figure"], _interval(of, of["figure"])] for of in differing]
    if len(lines) == 2:
        lines.append(["none differ", "", "", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(of: Mapping[str, Any], title: str) -> str:
    metric = next(column.metric for column in COLUMNS if column.title == title)
    return f"{difference_text(metric, Difference(**of['difference']))}{'*' if of['differs'] else ''}"


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    mark = _mark(cell)
    spread = f" ({min(cell['each']):.2g} to {max(cell['each']):.2g})" if len(cell["each"]) > 1 else ""
    return f"{cell['mean']:.3g}{mark}{spread}"


def _mark(cell: Mapping[str, Any]) -> str:
    if cell.get("differs") is None:
        return "" if cell["against"] in (None, BASE) else "?"
    return "*" if cell["differs"] else ""


def drawn(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The heat map: within a column the darker, the worse; its ends are the column's own."""
    titles = _titles(rows)
    means = np.array([[row["cells"].get(title, {}).get("mean", np.nan) for title in titles] for row in rows])
    low, high = np.nanmin(means, 0), np.nanmax(means, 0)
    shade = (means - low) / np.where(high > low, high - low, 1)
    figure = Figure(figsize=(2.6 + 0.95 * len(titles), 1.2 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shade, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    axes.set_xticks(range(len(titles)), [title.replace(" (", "\n(") for title in titles], fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), [row["stack"].replace("+", " + ").replace("_", " ") for row in rows], fontsize=8)
    axes.tick_params(length=0)
    for i, row in enumerate(rows):
        for j, title in enumerate(titles):
            cell = row["cells"].get(title)
            if cell is not None:
                colour = "white" if shade[i, j] > 0.6 else "black"
                axes.text(j, i, f"{cell['mean']:.3g}{_mark(cell)}", ha="center", va="center", fontsize=8, color=colour)
    return figure


if __name__ == "__main__":
    try:
        app()
    except PolicyPatchError as error:
        sys.exit(f"error: {error}")
