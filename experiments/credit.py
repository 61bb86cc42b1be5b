"""Where a patch has made rejected completions less likely: before what is unsafe in them, at it, or after it.

    python experiments/credit.py outputs/RUN outputs/RUN

DPO lowers the likelihood of a rejected completion as a whole. What is lowered after its first unsafe token (found by
the judges that chose the pairs, see `policypatch.data.cut`) makes no sample safer, as sampling has passed it by then.
Prints for each run what the patch has changed, in nats a completion, in the mean over the run's own pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from policypatch.data.cut import first_unsafe
from policypatch.data.pairs import Pair, load_pairs
from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.load import load_base
from policypatch.model.tree import Item
from policypatch.patch.artifact import load
from policypatch.prepare import made

AT_ONCE = 16  # completions
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Credit:
    """Changes of log-probability of a rejected completion, in nats: summed before and after its first unsafe token."""

    before: float
    unsafe: float
    after: float


@app.command()
def credit(runs: Annotated[list[Path], typer.Argument(help="folders of finished runs of one risk")]) -> None:
    """Print the table."""
    table = Table(title="change of a rejected completion's log-likelihood, nats", title_justify="left")
    for name in ("run", "pairs", "before", "first unsafe token", "after"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run in runs:
        found = credits_of(run)
        means = (sum(getattr(of, name) for of in found) / len(found) for name in ("before", "unsafe", "after"))
        table.add_row(str(run), str(len(found)), *(f"{mean:.1f}" for mean in means))
    Console(soft_wrap=True).print(table)


def credits_of(run: Path) -> list[Credit]:
    """Of every pair of a finished run whose rejected completion is unsafe somewhere.

    Raises:
        PolicyPatchError: a run of several risks, or none of its pairs has an unsafe token.
    """
    cfg = OmegaConf.load(run / "config.yaml")
    if not isinstance(cfg, DictConfig) or "filter" not in cfg.get("teacher", {}):
        raise PolicyPatchError(f"{run}: no run of one risk whose teacher draws pairs: give another")
    base, patch = load_base(cfg.model), load(run / "patch")
    pairs = [
        pair
        for pair in load_pairs(run / "pairs.jsonl")
        if pair.kind == "pair" and pair.rejected is not None and pair.rejected.tokens
    ]
    judges = {name: made(cfg.risk.judges[name], f"risk.judges.{name}") for name in cfg.teacher.judges}
    ends = first_unsafe(pairs, judges, cfg.teacher.filter.rejected_at_least, base)
    kept = [(pair, len(end.tokens or ())) for pair, end in zip(pairs, ends, strict=True) if end is not None]
    if not kept:
        raise PolicyPatchError(f"{run}: the judges find nothing unsafe in its pairs' rejected completions")
    found = []
    for start in range(0, len(kept), AT_ONCE):
        some = kept[start : start + AT_ONCE]
        changes = _changes(base, patch.vectors, [pair for pair, _ in some])
        found += [split(change, end) for change, (_, end) in zip(changes, some, strict=True)]
    return found


def split(changes: Sequence[float], end: int) -> Credit:
    """The changes of a completion's tokens, the `end`-th of which (from 1) is its first unsafe one."""
    return Credit(sum(changes[: end - 1]), changes[end - 1], sum(changes[end:]))


def _tokens(pair: Pair) -> tuple[int, ...]:
    assert pair.rejected is not None and pair.rejected.tokens is not None
    return pair.rejected.tokens


@torch.no_grad()
def _changes(base: Base, vectors: torch.Tensor, pairs: Sequence[Pair]) -> list[list[float]]:
    """What the patch has added to the log-probability of each token of the rejected completions."""
    items = [Item(tuple(base.encode_prompt(pair.prompt, pair.form)), (_tokens(pair),)) for pair in pairs]
    patched, plain = (PrefixBackbone(base.model, of) for of in (vectors, vectors[:0]))
    tree = patched.tree(items)
    change = patched.completion_logprobs(tree) - plain.completion_logprobs(plain.tree(items))
    return [change[tree.sequence == number].tolist() for number in range(tree.sequences)]


if __name__ == "__main__":
    try:
        app()
    except PolicyPatchError as error:
        sys.exit(f"error: {error}")
