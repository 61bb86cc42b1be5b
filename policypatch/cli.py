"""The command `policypatch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from rich import box
from rich.console import Console
from rich.table import Table

from policypatch.commands import audit, compose, export, patch, rebase, serve, squash
from policypatch.commands.base import composed
from policypatch.errors import PolicyPatchError
from policypatch.evaluate import judge_quality as quality
from policypatch.files.atomic import write_json
from policypatch.home import CONF
from policypatch.logs import quiet_libraries

os.environ.setdefault("POLICYPATCH_HOME", str(CONF.parent))  # conf/config.yaml finds experiments/ by it
REFUSALS, TOXICITY = ("refusal", "likelihood", "refusal_openings"), ("svm", "bilstm")
GENDER = ("words", "names")
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def policypatch() -> None:
    """Patch a language model's safety policy; training runs are started by `python run.py`."""


def sentence(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose user's mistakes end in one sentence and exit status 2."""

    @wraps(command)
    def told(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PolicyPatchError as error:
            sys.stderr.write(f"error: {error}\n")
            raise typer.Exit(2) from None

    return told


@app.command()
@sentence
def judges(
    json: Annotated[Path | None, typer.Option(help="file that the figures are written to")] = None,
    model: Annotated[bool, typer.Option(help="with the judges that need a language model (about a minute)")] = True,
) -> None:
    """Print how far the judges agree with people's labels."""
    figures = measured(model)
    _show(figures)
    if json is not None:
        write_json(json, figures)


@app.command()
@sentence
def compare(
    folders: Annotated[list[Path], typer.Argument(help="folders of sweeps or of runs")],
    out: Annotated[Path | None, typer.Option(help="folder that is written to; the first of the folders")] = None,
) -> None:
    """Put runs side by side: compare.html, .csv and .md, and the figures as SVG."""
    from policypatch.report.compare import compare as compared
    from policypatch.report.compare import say

    target = out or folders[0]
    say(compared(folders, target), target)


@app.command()
@sentence
def cache(
    clean: Annotated[bool, typer.Option("--clean", help="remove entries")] = False,
    kind: Annotated[str | None, typer.Option(help="only of this kind")] = None,
    older_than_days: Annotated[float | None, typer.Option(help="only what was last used longer ago", min=0)] = None,
) -> None:
    """Say what the cache holds, by kind; with --clean, remove it: while runs go on, only with --older-than-days."""
    from policypatch.files import upkeep as kept
    from policypatch.files.cache import cache_root
    from policypatch.report.costs import size

    rows = kept.usage()
    if kind is not None and kind not in {name for name, _, _ in rows}:
        raise PolicyPatchError(
            f"the cache has no {kind!r}: it has {', '.join(name for name, _, _ in rows) or 'nothing'}"
        )
    console = Console(soft_wrap=True, highlight=False)
    if clean:
        console.print(f"{size(kept.clean(kind, older_than_days))} freed in {cache_root()}", markup=False)
        return
    console.print(f"{cache_root()}", markup=False)
    for name, entries, used in sorted(rows, key=lambda row: -row[2]):
        console.print(
            f"  {name:<12} {entries:>6} {'entry' if entries == 1 else 'entries':<7} {size(used):>9}", markup=False
        )


def add(command: Callable[..., None], name: str | None = None) -> None:
    """Have a command of another file."""
    app.command(name)(sentence(command))


for commands in (patch, compose, squash, rebase, audit, export, serve):
    commands.register(add)


def measured(model: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Rows of figures by the set of labels they are measured on."""
    names = [name for name in REFUSALS if model or name != "likelihood"]
    made = _made([f"+judge@judges.{name}={name}" for name in names], "judges", names)
    tables = {}
    for part in quality.refusals():
        rows = quality.auc_table(made, part.texts, part.labels, prompts=part.prompts, inverted=True, mean=False)
        tables[part.name] = [asdict(row) for row in rows]
    part = quality.objectives()
    rows = quality.auc_table(made, part.texts, part.labels, prompts=part.prompts, mean=False)
    tables[part.name] = [asdict(row) for row in rows]
    toxic = _made(["risk=toxicity"], "risk.judges", TOXICITY)
    part = quality.hate_speech()
    tables[part.name] = [asdict(row) for row in quality.auc_table(toxic, part.texts, part.labels)]
    part = quality.gendered()
    words = _made(["risk=gender_bias"], "risk.judges", GENDER)
    tables[part.name] = [asdict(row) for row in quality.auc_table(words, part.texts, part.labels, mean=False)]
    ranks = quality.rank_table(toxic, *quality.perspective_scores())
    tables["Spearman's rank correlation with Perspective"] = [asdict(row) for row in ranks]
    return tables


def _made(overrides: list[str], where: str, names: tuple[str, ...] | list[str]) -> list[Any]:
    """Judges of conf/, in this order."""
    quiet_libraries()
    node: Any = composed(overrides)
    try:
        for key in where.split("."):
            node = node[key]
        return [instantiate(node[name]) for name in names]
    except InstantiationException as error:
        if isinstance(error.__cause__, PolicyPatchError):
            raise error.__cause__ from None
        raise PolicyPatchError(f"a judge of conf/ cannot be made: {error}") from error


def _show(tables: dict[str, list[dict[str, Any]]]) -> None:
    console = Console(width=min(80, Console().width))
    for title, rows in tables.items():
        console.print(f"{title} (n={rows[0]['n']})", highlight=False)  # a table's own title is folded to its width
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
        table.add_column("judge")
        if "spearman" in rows[0]:
            table.add_column("rho", justify="right")
            for row in rows:
                table.add_row(row["judge"], f"{row['spearman']:.3f}")
        else:
            for column in ("agreement", "precision", "recall", "AUC"):
                table.add_column(column, justify="right")
            for row in rows:
                table.add_row(
                    row["judge"],
                    _interval(row["agreement"], row["agreement_low"], row["agreement_high"]),
                    _interval(row["precision"]),
                    _interval(row["recall"]),
                    _interval(row["auc"], row["low"], row["high"]),
                )
        console.print(table)


def _interval(value: float | None, low: float | None = None, high: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None else f"{value:.2f} [{low:.2f}, {high:.2f}]".replace("[", r"\[")
