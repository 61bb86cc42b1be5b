"""`policypatch squash`: a stack distilled into one shorter patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from policypatch.commands.base import (
    MODEL,
    Register,
    base_overrides,
    composed,
    evaluate_settings,
    marked_of_any,
    refuse_existing,
    risk_overrides,
    stack_overrides,
)

if TYPE_CHECKING:
    from policypatch.prepare import Part

console = Console(soft_wrap=True, highlight=False)
ARM = "squashed"


def register(add: Register) -> None:
    """Add the command."""
    add(squash)


def squash(
    patches: Annotated[list[Path], typer.Argument(help="a stack's folder, or several patches' in their order")],
    model: Annotated[str, typer.Option(help=MODEL)],
    out: Annotated[Path, typer.Option(help="folder of the patch")],
    length: Annotated[int, typer.Option(help="vectors of the patch")] = 50,
    steps: Annotated[int, typer.Option(help="optimiser steps", min=1)] = 200,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 1e-2,
    batch_size: Annotated[int, typer.Option(help="rows a step", min=1)] = 8,
    prompts: Annotated[int, typer.Option(help="of each risk, and as many benign ones", min=1)] = 200,
    name: Annotated[str | None, typer.Option(help="of the patch; the stack's with -squashed")] = None,
    version: Annotated[str, typer.Option(help="of the patch")] = "0.1.0",
    seed: Annotated[int, typer.Option(help="of what is written and of the order of rows")] = 0,
    key: Annotated[Path | None, typer.Option(help="public key that must have signed the stack")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as run.py takes it")] = None,
) -> None:
    """Train a patch of fewer vectors to do what a stack does, and measure both.

    It learns the next-token distributions of the base behind the stack, on what that writes to the training prompts and
    the benign prompts of all of the stack's risks. A command that was interrupted goes on where it stopped.
    """
    from policypatch.evaluate.arms import evaluate_arms
    from policypatch.evaluate.kept import kept
    from policypatch.evaluate.scorecard import PER_PROMPT
    from policypatch.files.atomic import read_json
    from policypatch.files.cache import content_key
    from policypatch.logs import quiet_libraries
    from policypatch.model.arm import Arm
    from policypatch.patch.artifact import load, save
    from policypatch.patch.lineage import derived
    from policypatch.patch.stacking import check_parts
    from policypatch.patch.stacking import stack as stacked
    from policypatch.places import told_by_row
    from policypatch.prepare import prepare
    from policypatch.report.metrics import reducible
    from policypatch.report.table import scorecard_table
    from policypatch.squash import examples, shortened, squashed

    refuse_existing(out)
    loaded = [load(folder, require_signature=key) for folder in patches]
    check_parts(loaded)
    whole = loaded[0] if len(loaded) == 1 else stacked(loaded)
    shortened(whole.vectors, length)  # a length that is none ends the command here
    risks = whole.manifest.risks
    quiet_libraries()
    asked = {"steps": steps, "lr": lr, "batch_size": batch_size}
    cfg = composed(
        [
            *risk_overrides(risks),
            *base_overrides(model),
            *stack_overrides(patches),
            *(f"sft.{name}={value}" for name, value in asked.items()),
            *("logger=csv", "evaluate.costs.prompts=[]", f"seed={seed}"),
            *(setting or []),
        ]
    )
    ready = prepare(cfg)
    stack, plan = whole.vectors, ready.plan
    texts = _prompts(cfg, ready.parts, risks, prompts, seed)
    answer = plan.response_sampling.max_new_tokens
    rows = examples(ready.base, stack, texts, plan.sampling, seed, plan.decode_rows, answer)
    about = {"stack": whole.manifest.sha256, "length": length, "stage": asked, "seed": seed, "prompts": prompts}
    about |= {"set": list(setting or []), "answer_tokens": answer}
    # Another base or other prompts are another training, which nothing that was begun before goes on in.
    key_of_all = content_key(base=asdict(ready.base.identity), learned=[list(of) for _, of in texts], **about)
    work = Path("outputs", "squash", f"{whole.manifest.name}-{key_of_all[:12]}")
    vectors = squashed(ready.base, stack, length, rows, cfg.sft, cfg.trainer, work, seed, cfg.row_tokens)
    arms = [Arm("base"), Arm("stack", vectors=stack), Arm(ARM, vectors=vectors)]
    probes, marked = [*ready.own, *ready.others], marked_of_any(cfg, ready)
    with told_by_row(cfg):
        card = [asdict(row) for row in evaluate_arms(ready.bench(cfg), probes, [], marked, arms, work)]
    values = read_json(work / PER_PROMPT)
    shares = kept(values, ARM, values, "stack", reducible(), ready.bench(cfg).settings)
    about |= {"rows": len(rows), "kept": [share.to_json() for share in shares]}
    training = {"squash": about, "evaluate": evaluate_settings(cfg)}
    name = name or f"{whole.manifest.name}-squashed"
    save(derived(whole, vectors, name=name, version=version, training=training, scorecard=card), out)
    Console().print(scorecard_table(card, cfg.evaluate.level))
    for share in shares:
        what = " ".join(part for part in share.place if part)
        console.print(f"{what}: keeps {share.told()} of the stack's reduction ({share.reduction:.3g})", markup=False)
    console.print(f"{out}: {len(stack)} vectors -> {length}; figures and checkpoints in {work}", markup=False)


def _prompts(cfg: Any, parts: Sequence[Part], risks: Sequence[str], most: int, seed: int) -> list[Any]:
    """Of each of the stack's risks its training prompts and its benign ones, by the form that they have."""
    from policypatch.prepare import made
    from policypatch.squash import drawn

    found, own = [], {part.risk.name: part.risk for part in parts}
    for name in risks:
        if name not in own and name not in cfg.others:
            console.print(f"! no prompts of {name} are known here: of its patch is kept what others' prompts show")
            continue
        risk = own.get(name) or made(cfg.others[name], f"others.{name}")
        sets = (drawn(of, most, seed) for of in ([risk.training_prompts], risk.benign_sets))
        found += [(risk.form, texts) for texts in sets if texts]
    return found
