"""What stacks do to each risk, from the runs of +experiment=composition or growth over seeds.

    python experiments/interference.py outputs/composition --out experiments/results/composition [--name matrix]
    python experiments/interference.py outputs/composed_companions --against outputs/composition --out FOLDER

Writes NAME.json, NAME.png (a heat map) and prints tables in Markdown. Each cell of the first is the mean over seeds,
its interval over prompts (of perplexities, which are no means over prompts, the mean of the runs' own intervals), the
least and the most of the seeds, and whether it differs from what it is compared with: the patch that is trained against
that column's risk, standing alone, which is called by the risk's name; of utility, which no patch is trained for, the
worst of the stack's own patches alone (the base's KL is 0 by definition, so that every patch differs from it). ? where
that is not among the arms. The second has those differences with their intervals (of perplexities, whose logarithms are
tested, the ratio). Then come what `contrasts.py` compares: orders of the same patches, each risk's own patch last less
first, a patch beside the stacks less the stacks of all patches, a growing stack less itself without its last patch, and
with --against another sweep of the same seeds and prompts, and what share of the gap in company is closed here. Tests
and intervals are paired over prompts, whose values are averaged over seeds, and Holm's correction is over all cells of
a column, of the other tables over the whole table.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from contrasts import (
    ALPHA,
    BASE,
    COLUMNS,
    UTILITY,
    Column,
    Run,
    across,
    arms_of,
    at,
    closed,
    growth,
    joint_less_stacks,
    order_rule,
    orders,
    parts,
    seeds_values,
    split_of,
    tested,
)
from matplotlib.figure import Figure
from rich.console import Console

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.drift import holm
from policypatch.evaluate.per_prompt import nanmean
from policypatch.evaluate.scorecard import PER_PROMPT
from policypatch.evaluate.statistics import Difference, bootstrap_interval
from policypatch.files.atomic import atomic_path, read_json, write_json
from policypatch.report.head_to_head import difference_text
from policypatch.report.records import find_records

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    folders: Annotated[list[Path], typer.Argument(help="sweeps of +experiment=composition or growth over seeds")],
    out: Annotated[Path, typer.Option(help="folder that is written to")],
    name: Annotated[str, typer.Option(help="of the files")] = "matrix",
    against: Annotated[Path | None, typer.Option(help="sweep that arms of the same names are compared with")] = None,
) -> None:
    """The matrix of stacks and figures."""
    runs = _by_seed(folders)
    cards, values = _read(runs, list(runs))
    found = matrix(cards, values)
    contrasts = {
        "orders": orders(cards, values),
        "order_rule": order_rule(cards, values),
        "joint": joint_less_stacks(cards, values),
        "growth": growth(cards, values),
    }
    told = [table(found), differences(found), *(contrasts_table(of, what) for what, of in contrasts.items() if of)]
    if against is not None:
        others = _by_seed([against])
        shared = [seed for seed in runs if seed in others]
        if not shared:
            raise PolicyPatchError(f"{against} shares no seed with {folders[0]}: run both with equal seeds")
        both = (*_read(runs, shared), *_read(others, shared))
        lines, left_out = across(*both)
        shares = closed(*both)
        contrasts |= {"across": lines, "closed": [line | line["share"].to_json() for line in shares]}
        told.append(contrasts_table(lines, f"here less {against.name}, seeds {', '.join(map(str, shared))}"))
        told += [closed_table(shares)] if shares else []
        if left_out:
            told.append(f"left out, as the base has other values in either: {', '.join(left_out)}")
    write_json(out / f"{name}.json", {"seeds": list(runs), "rows": found, **contrasts})
    with atomic_path(out / f"{name}.png") as temporary:
        drawn(found).savefig(temporary, format="png", dpi=110)
    Console(soft_wrap=True).print("\n\n".join(told), markup=False, highlight=False)


def _by_seed(folders: Sequence[Path]) -> dict[Any, Any]:
    """The finished runs of a sweep."""
    found: dict[Any, Any] = {}
    for record in (one for one in find_records(folders) if one.finished):
        seed = record.settings["seed"]
        if seed in found:
            raise PolicyPatchError(
                f"seed {seed} has several runs here: give the runs of one sweep over seeds, another one by --against"
            )
        found[seed] = record
    if not found:
        raise PolicyPatchError(f"{folders[0]} holds no finished run: start the sweep again, it goes on")
    return found


def _read(runs: Mapping[Any, Any], seeds: Sequence[Any]) -> tuple[list[Run], list[Run]]:
    """Scorecards and values of these seeds."""
    return [runs[seed].rows for seed in seeds], [read_json(runs[seed].folder / PER_PROMPT) for seed in seeds]


def matrix(cards: Sequence[Run], values: Sequence[Run]) -> list[Any]:
    """A row for each arm that all runs have: `stack` and `cells`, by the columns' titles.

    Args:
        cards: scorecards of runs that differ in their seed.
        values: their values prompt by prompt.
    """
    rows: list[dict[str, Any]] = [{"stack": arm, "cells": {}} for arm in arms_of(cards)]
    for column in COLUMNS:
        tests: dict[str, Difference] = {}
        split = split_of(cards, column)
        for row in rows:
            here = [[one for one in of if at(one, row["stack"], column, split)] for of in cards]
            if all(here):
                row["cells"][column.title] = _described(column, [found[0] for found in here], values, split)
        means = {row["stack"]: row["cells"][column.title]["mean"] for row in rows if column.title in row["cells"]}
        for row in (row for row in rows if row["stack"] in means):
            against = _against(row["stack"], column, means)
            row["cells"][column.title]["against"] = against
            if against is not None:
                both = (seeds_values(values, arm, column, split) for arm in (row["stack"], against))
                if (test := tested(*both, permutations=9_999)) is not None:  # enough for a column's few tests
                    tests[row["stack"]] = test
        differs = dict(zip(tests, holm([test.p_value for test in tests.values()], ALPHA), strict=True))
        for row in rows:
            if (stack := row["stack"]) in tests:
                row["cells"][column.title] |= {"difference": asdict(tests[stack]), "differs": differs[stack]}
    return rows


def _described(column: Column, rows: Run, values: Sequence[Run], split: str | None) -> dict[str, Any]:
    """The mean over runs and its interval over prompts."""
    found = seeds_values(values, rows[0]["arm"], column, split)
    if found is None or "ppl" in column.metric or np.isnan(found).all():
        low, high = (float(np.mean([row[end] for row in rows])) for end in ("low", "high"))
    else:
        low, high = bootstrap_interval(found.T, lambda drawn: nanmean(drawn.reshape(len(drawn), -1)))
    each = [float(row["value"]) for row in rows]
    return {"mean": float(np.mean(each)), "each": each, "low": low, "high": high}


def _against(stack: str, column: Column, means: Mapping[str, float]) -> str | None:
    """What a stack is compared with in a figure; None where that is nothing."""
    specialist = column.own
    if stack in (BASE, specialist):
        return None
    if column.metric not in UTILITY:
        return specialist or BASE
    if len(parts(stack)) == 1:
        return None if column.metric == "kl_benign" else BASE
    members = [part for part in parts(stack) if part in means]
    return max(members, key=lambda part: means[part]) if len(members) == len(parts(stack)) else "its worst patch"


def _titles(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [column.title for column in COLUMNS if any(column.title in row["cells"] for row in rows)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: the mean over seeds and its interval, * where it differs from what it is compared with."""
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
            told = (_less(cell, title) if "differs" in cell else "–" for title, cell in cells.items())
            lines.append([row["stack"], *told])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def contrasts_table(found: Sequence[Mapping[str, Any]], what: str = "orders") -> str:
    """In Markdown: those that differ, and how many were compared; of the rule for orders all, with each seed's sign."""
    lines = [[what.replace("_", " "), "less", "figure", f"difference (of {len(found)} compared)"], ["---"] * 4]
    for of in found:
        if of["differs"] or "each" in of:
            signs = "".join(f", {'+' if x > 0 else '−' if x < 0 else '0'}" for x in of.get("each", ()))
            told = _interval(of, of["figure"]) + (f" (by seed: {signs[2:]})" if signs else "")
            lines.append([of["one"], of["other"], of["figure"], told])
    if len(lines) == 2:
        lines.append(["none differ", "", "", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def closed_table(found: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: what a risk rises by in company, and what share of that the stacks here do away with."""
    lines = [["figure", "stacks", "gap in company", "share closed"], ["---"] * 4]
    lines += [[of["figure"], str(of["stacks"]), f"{of['share'].reduction:+.2g}", of["share"].told()] for of in found]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _less(cell: Mapping[str, Any], title: str) -> str:
    """The difference; of utility it is said what from."""
    metric = next(column.metric for column in COLUMNS if column.title == title)
    return _interval(cell, title) + (f" ({cell['against']})" if metric in UTILITY else "")


def _interval(of: Mapping[str, Any], title: str) -> str:
    metric = next(column.metric for column in COLUMNS if column.title == title)
    return f"{difference_text(metric, Difference(**of['difference']))}{'*' if of['differs'] else ''}"


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    seeds = f" ({min(cell['each']):.2g} to {max(cell['each']):.2g})" if len(cell["each"]) > 1 else ""
    return f"{cell['mean']:.3g}{_mark(cell)} [{cell['low']:.2g}, {cell['high']:.2g}]{seeds}"


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
