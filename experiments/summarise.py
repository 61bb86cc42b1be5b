"""What several finished runs say together: a table over seeds, or a plot of one figure against another.

    python experiments/summarise.py seeds RUN RUN RUN --out FOLDER      seeds.json, and a table in Markdown to print
    python experiments/summarise.py frontier RUN ... --x over_refusal --y asr --judge refusal --out FOLDER

RUN is a run's folder in outputs/. Runs of a frontier are named by the config keys they differ in.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import Row, Scorecard
from policypatch.files.atomic import atomic_path, write_json
from policypatch.report.records import BESIDE, differing, settings_of

FIGURES = ("value", "low", "high", "upper", "delta", "p_value")
KEY = ("risk", "split", "metric", "judge")
Runs = Annotated[list[Path], typer.Argument(help="folders of finished runs")]
Out = Annotated[Path, typer.Option(help="folder that is written to")]
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def seeds(runs: Runs, out: Out) -> None:
    """Every figure of base and patch in runs that differ in their seed alone: each one's, and their mean.

    Some of them may be measured on fewer sets.
    """
    settings = [settings_of(run) for run in runs]
    unlike = [key for key in sorted(set().union(*settings)) if _differs(settings, key)]
    if others := [key for key in unlike if not (key.endswith("seed") or key.startswith(BESIDE))]:
        raise PolicyPatchError(f"the runs differ in {others[0]}: give runs that differ in their seed alone")
    given = [own["seed"] for own in settings]
    if twice := [seed for seed in given if given.count(seed) > 1]:
        raise PolicyPatchError(f"seed {twice[0]} is given twice: leave one of its runs out")
    cards = {seed: Scorecard.load(run / "scorecard.json") for seed, run in zip(given, runs, strict=True)}
    rows = table_over_seeds(cards)
    write_json(out / "seeds.json", rows)
    print_table(rows, sorted(cards))


@app.command()
def frontier(
    runs: Runs,
    out: Out,
    x: Annotated[str, typer.Option(help="metric of the x axis")] = "over_refusal",
    y: Annotated[str, typer.Option(help="metric of the y axis")] = "asr",
    judge: Annotated[str, typer.Option(help="whose figures")] = "refusal",
    name: Annotated[str, typer.Option(help="of the two files")] = "frontier",
) -> None:
    """Plot a metric of the patch against another, one point a run, with the intervals of both."""
    settings = [settings_of(run) for run in runs]
    points = []
    for run, own, label in zip(runs, settings, labels(settings), strict=True):
        card = Scorecard.load(run / "scorecard.json")
        found = {axis: _own(card, metric, judge) for axis, metric in (("x", x), ("y", y))}
        figures = {axis: {"value": row.value, "low": row.low, "high": row.high} for axis, row in found.items()}
        points.append({"label": label, "seed": own["seed"], "n": found["y"].n} | figures)
    write_json(out / f"{name}.json", {"x": x, "y": y, "judge": judge, "points": points})
    with atomic_path(out / f"{name}.png") as temporary:
        drawn(points, x, y, judge).savefig(temporary, format="png", dpi=110)


def table_over_seeds(cards: Mapping[int, Scorecard]) -> list[dict[str, Any]]:
    """For each figure: the base's, the patch's of each seed that has it, and the mean of these.

    The base is the same in all of them: its completions are drawn by `evaluate.seed`.

    Raises:
        PolicyPatchError: it is not.
    """
    bases: dict[tuple[str | None, ...], Row] = {}
    for seed, card in cards.items():
        for row in (row for row in card if row.arm == "base"):
            known = bases.setdefault(_key(row), row)
            if known.n != row.n or not math.isclose(known.value, row.value, rel_tol=1e-6):
                raise PolicyPatchError(
                    f"the base of seed {seed} has {row.metric} {row.value:.4g} of {row.n} prompts where another seed's "
                    f"has {known.value:.4g} of {known.n}: measure them the same way, on one machine"
                )
    rows = []
    for where, base in bases.items():
        patches = {seed: [r for r in card if r.arm == "patch" and _key(r) == where] for seed, card in cards.items()}
        figures = {
            str(seed): {name: getattr(r, name) for name in FIGURES} for seed, found in patches.items() for r in found
        }
        if not figures:
            continue
        mean = sum(figure["value"] for figure in figures.values()) / len(figures)
        named = dict(zip(KEY, where, strict=True))
        rows.append(named | {"filter": base.filter, "n": base.n, "base": base.value, "patch": figures, "mean": mean})
    return rows


def print_table(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> None:
    """In Markdown: the base's figure, each seed's with its 95 % interval, * where it differs from the base."""
    head = ["risk", "split", "metric", "judge", "base", *(f"seed {seed}" for seed in seeds), "mean"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        judge = f"{row['judge'] or ''}{' (had a part in training)' if row['filter'] else ''}".strip()
        tested = row["metric"] != "kl_benign"  # the base's is 0 by definition: that another differs is no finding
        cells = [_cell(row["patch"].get(str(seed)), tested) for seed in seeds]
        few = "" if len(row["patch"]) == len(seeds) else f" of {len(row['patch'])}"
        mean = f"{row['mean']:.3g}{few}"
        lines.append([row["risk"], row["split"], row["metric"], judge, f"{row['base']:.3g}", *cells, mean])
    Console(soft_wrap=True).print("\n".join(f"| {' | '.join(line)} |" for line in lines), markup=False, highlight=False)


def _cell(figure: Mapping[str, Any] | None, tested: bool) -> str:
    if figure is None:
        return "–"
    mark = "*" if tested and figure["p_value"] is not None and figure["p_value"] < 0.05 else ""
    return f"{figure['value']:.3g}{mark} ({figure['low']:.3g} to {figure['high']:.3g})"


def labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each run's values of the keys in which the runs differ; keys that always change together are named once."""
    keys = differing(settings)
    return [", ".join(f"{key}={own.get(key)}" for key in keys) or "run" for own in settings]


def drawn(points: Sequence[Mapping[str, Any]], x: str, y: str, judge: str) -> Figure:
    """The plot: lower left is best."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, point in enumerate(points, 1):
        at = point["x"]["value"], point["y"]["value"]
        xerr, yerr = ([[p["value"] - p["low"]], [p["high"] - p["value"]]] for p in (point["x"], point["y"]))
        colour = f"C{(number - 1) % 10}"
        axes.errorbar(
            *at, yerr, xerr, fmt="o", color=colour, elinewidth=0.8, alpha=0.9, label=f"{number}  {point['label']}"
        )
        axes.annotate(str(number), at, xytext=(5, 5), textcoords="offset points", color=colour)
    axes.set(xlabel=f"{x.replace('_', ' ')} ({judge})", ylabel=f"{y.replace('_', ' ')} ({judge})")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    return figure


def _own(card: Scorecard, metric: str, judge: str) -> Row:
    """The patch's figure of its own risk."""
    found = [row for row in card if (row.arm, row.metric, row.judge) == ("patch", metric, judge)]
    if not found:
        raise PolicyPatchError(f"a scorecard has no {metric} of the patch by {judge}: choose other axes")
    return found[0]


def _differs(settings: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether a key has several values; that a run leaves a set of prompts out is none."""
    having = [own for own in settings if key in own] if key.startswith("risk.evaluation.") else settings
    return any(own.get(key) != having[0].get(key) for own in having)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in KEY)


if __name__ == "__main__":
    try:
        app()
    except PolicyPatchError as error:
        sys.exit(f"error: {error}")
