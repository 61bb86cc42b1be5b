"""`policypatch compose`: the stack that serves best, of the patches that there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from policypatch.commands.base import (
    MODEL,
    Register,
    base_overrides,
    composed,
    evaluate_settings,
    filters_of_any,
    known_risk,
    marked_of_any,
    refuse_existing,
    stack_overrides,
)
from policypatch.errors import PolicyPatchError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from policypatch.composition import Asked, Candidate
    from policypatch.evaluate.measure import Measured
    from policypatch.evaluate.probes import Bench
    from policypatch.prepare import Prepared

console = Console(soft_wrap=True, highlight=False)
SHOWN = 8  # of the Pareto set


def register(add: Register) -> None:
    """Add the command."""
    add(compose)


def compose(
    patches: Annotated[list[Path], typer.Argument(help="folders of patches for one base")],
    model: Annotated[str, typer.Option(help=MODEL)],
    out: Annotated[Path, typer.Option(help="folder of the stack")],
    objective: Annotated[
        list[str] | None, typer.Option(help="RISK.METRIC to be small; the patches' risks and utility.kl_benign")
    ] = None,
    budget: Annotated[int, typer.Option(help="candidates that are measured", min=1)] = 24,
    scales: Annotated[bool, typer.Option(help="whether patches may be made weaker and stronger")] = True,
    prompts: Annotated[int, typer.Option(help="of each set: half to choose by, half to report", min=4)] = 100,
    name: Annotated[str | None, typer.Option(help="of the stack; the parts' names joined")] = None,
    version: Annotated[str, typer.Option(help="of the stack")] = "0.1.0",
    seed: Annotated[int, typer.Option(help="of the search")] = 0,
    key: Annotated[Path | None, typer.Option(help="public key that must have signed every patch")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as run.py takes it")] = None,
) -> None:
    """Search subset, order and strength of patches, and write the stack that serves best.

    Candidates are measured on every second prompt, those that no other beats on the others as well. What is written has
    the figures of those others, and says in its manifest how it was found.
    """
    try:
        from policypatch import composition as search
    except ModuleNotFoundError as error:
        raise PolicyPatchError(f"policypatch compose needs {error.name}: pip install policypatch[sweeps]") from error
    from policypatch.patch.artifact import Patch, load, save
    from policypatch.patch.stacking import check_parts, stack
    from policypatch.places import told_by_row

    refuse_existing(out)
    parts = [load(folder, require_signature=key) for folder in patches]
    check_parts(parts)
    risks = list(dict.fromkeys(risk for part in parts for risk in part.manifest.risks))
    aims = [search.Aim.read(text) for text in objective or ()]
    cfg, ready = _ready(patches, model, prompts, risks, list(setting or []))
    bench, probes = ready.bench(cfg), [*ready.own, *ready.others]
    if not aims and (unseen := [risk for risk in risks if risk not in {probe.risk for probe in probes}]):
        raise PolicyPatchError(
            f"{unseen[0]} is measured by nothing here, so its patch would be left out: say by --objective what counts"
        )
    filters, marked = filters_of_any(cfg, ready), marked_of_any(cfg, ready)
    wanted = [
        search.asked(aim, probes, filters.get(aim.risk, ()), marked.get(aim.risk, ()))
        for aim in aims or search.usual(risks, probes)
    ]
    names = [str(one.aim) for one in wanted]
    told = _caveats(wanted, filters, marked)
    hand_made = search.hand_made(len(parts))
    if budget < len(hand_made):
        told.append(f"--budget {budget} leaves out some of the {len(hand_made)} stacks that one would try by hand")

    def figures(candidate: Candidate | None, which: int) -> list[Measured]:
        vectors = None if candidate is None else candidate.vectors(parts)
        label = "base" if candidate is None else candidate.named(parts)
        with told_by_row(cfg):
            return [one.measured(bench, vectors, label, which) for one in wanted]

    def values(candidate: Candidate | None) -> tuple[float, ...]:
        return tuple(float(of.metric.compute()) for of in figures(candidate, 0))

    base = values(None)
    tried = search.search(len(parts), values, len(wanted), budget, seed, scales)
    chosen = search.best(tried, base).candidate
    front = sorted(search.pareto(tried), key=lambda one: one.values)
    by_hand = search.best([one for one in tried if one.candidate in hand_made], base).candidate
    first = [one for one in tried if one.candidate in (chosen, by_hand)]
    shown = first + [one for one in front if one not in first]
    table = {"base": (base, figures(None, 1))}
    table |= {one.candidate.named(parts): (one.values, figures(one.candidate, 1)) for one in shown[:SHOWN]}
    intervals = {label: _intervals(measured, bench) for label, (_, measured) in table.items()}
    chosen_by = {label: values for label, (values, _) in table.items()}
    _show(names, chosen_by, intervals, chosen.named(parts), by_hand.named(parts))
    if len(shown) > SHOWN:
        console.print(f"{len(shown) - SHOWN} more that no other beats are in the manifest", markup=False)
    for line in told:
        console.print(f"! {line}", markup=False)
    against: list[str] = []
    if chosen != by_hand:
        against = _compared(wanted, table[by_hand.named(parts)][1], table[chosen.named(parts)][1], bench)
    for line in against:
        console.print(line, markup=False)
    found = {
        "objectives": names,
        "judges": [one.judge for one in wanted],
        "caveats": told,
        "budget": budget,
        "seed": seed,
        "prompts": prompts,
    }
    found |= {"order": [parts[i].manifest.name for i in chosen.order], "scales": list(chosen.scales)}
    found |= {"best_by_hand": by_hand.named(parts), "against_it": against}
    found |= {
        "tried": [
            {"candidate": one.candidate.named(parts), "values": _finite(one.values), "unbeaten": one in front}
            for one in tried
        ],
        "reported": {label: [_finite(one) for one in of] for label, of in intervals.items()},
    }
    scaled = [Patch(s * parts[i].vectors, parts[i].manifest) for i, s in zip(chosen.order, chosen.scales, strict=True)]
    made = stack(scaled, name, version, alone=True)
    rows = _rows(wanted, table["base"][1], table[chosen.named(parts)][1], marked, bench)
    manifest = replace(
        made.manifest, training={"composition": found, "evaluate": evaluate_settings(cfg)}, scorecard=rows
    )
    save(Patch(made.vectors, manifest), out)
    console.print(f"{out}: {chosen.named(parts)}, {made.manifest.length} vectors", markup=False)


def _ready(
    folders: Sequence[Path], model: str, prompts: int, risks: Sequence[str], setting: list[str]
) -> tuple[DictConfig, Prepared]:
    """The base and the probes of all risks, everything checked against each other."""
    from policypatch.logs import quiet_libraries
    from policypatch.prepare import prepare

    quiet_libraries()
    cfg = composed(
        [
            f"risk={known_risk(risks)}",
            *base_overrides(model),
            *stack_overrides(folders),
            *(f"evaluate.{key}={prompts}" for key in ("prompts", "other_prompts")),
            *("logger=csv", "scorer=base", "evaluate.costs.prompts=[]"),
            *setting,
        ]
    )
    return cfg, prepare(cfg)


def _caveats(
    wanted: Sequence[Asked], filters: Mapping[str, Sequence[str]], marked: Mapping[str, Sequence[str]]
) -> list[str]:
    """What the figures must not be taken for: a sentence for each judge that had a part in training, and of halves."""
    told = []
    for one in wanted:
        if (one.judge or one.aim.metric) in marked.get(one.aim.risk, ()):
            part = (
                "chooses training pairs"
                if one.judge in filters.get(one.aim.risk, ())
                else "counts what training pairs are chosen by"
            )
            told.append(f"{one.aim} is by {one.judge or 'itself'}, which {part}: no other is there")
    if any(one.aim.risk == "gender_bias" for one in wanted):
        told.append("both halves of gender_bias's prompts are about the same professions, in other sentences")
    return told


def _finite(values: Sequence[float]) -> list[float | None]:
    """For a manifest: None where there is no figure, which JSON has no number for."""
    return [value if math.isfinite(value) else None for value in values]


def _intervals(measured: Sequence[Measured], bench: Bench) -> list[tuple[float, float, float]]:
    """Each figure with the ends of its interval."""
    how = bench.settings
    return [(float(of.metric.compute()), *of.metric.interval(how.level, how.resamples, how.seed)) for of in measured]


def _show(
    names: Sequence[str],
    chosen_by: Mapping[str, Sequence[float]],
    intervals: Mapping[str, Sequence[tuple[float, float, float]]],
    chosen: str,
    by_hand: str,
) -> None:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    shown.add_column("stack", overflow="fold")
    for name in names:
        shown.add_column(Text(name), overflow="fold")
    for label, values in chosen_by.items():
        cells = [
            Text(f"{value:.3g} / {now:.3g} [{low:.2g}, {high:.2g}]")
            for value, (now, low, high) in zip(values, intervals[label], strict=True)
        ]
        shown.add_row(Text(label + " *" * (label == chosen) + " (by hand)" * (label == by_hand)), *cells)
    Console(width=max(80, Console().width)).print(shown)
    told = "by the prompts chosen by / by others [interval]; * is written; (by hand): the best at full strength"
    console.print(told, markup=False)


def _compared(
    wanted: Sequence[Asked], by_hand: Sequence[Measured], chosen: Sequence[Measured], bench: Bench
) -> list[str]:
    """What is written against the best that hands find, on the prompts that chose neither: a line for each figure."""
    from policypatch.evaluate.measure import rows_of

    lines = []
    for one, theirs, ours in zip(wanted, by_hand, chosen, strict=True):
        arms = {"hand": [theirs], "chosen": [ours]}
        rows = {row.arm: row for row in rows_of(arms, one.aim.risk, one.probes[1].split, (), bench.settings)}
        if len(rows) < 2:  # one of them has no figure
            continue
        row = rows["chosen"]
        told = f"{one.aim}: {row.value:.3g}, the best by hand {rows['hand'].value:.3g}"
        if row.delta is not None:
            ends = f"[{row.delta_low:+.2g}, {row.delta_high:+.2g}]"
            told += f"; difference {row.delta:+.2g} {ends}, p = {row.p_value:.2g}"
        lines.append(told)
    return lines


def _rows(
    wanted: Sequence[Asked],
    base: Sequence[Measured],
    stack: Sequence[Measured],
    marked: Mapping[str, Sequence[str]],
    bench: Bench,
) -> list[dict[str, Any]]:
    """Scorecard rows of base and stack on the prompts that did not choose it."""
    from policypatch.evaluate.measure import rows_of

    rows = []
    for one, of_base, of_stack in zip(wanted, base, stack, strict=True):
        arms = {"base": [of_base], "stack": [of_stack]}
        of_training = marked.get(one.aim.risk, ())
        rows += [asdict(row) for row in rows_of(arms, one.aim.risk, one.probes[1].split, of_training, bench.settings)]
    return rows
