"""`policypatch rebase`: a patch carried to another version of its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from policypatch.commands.base import (
    MODEL,
    Register,
    base_of,
    base_overrides,
    composed,
    evaluate_settings,
    marked_of_any,
    quoted,
    refuse_existing,
    risk_overrides,
)
from policypatch.errors import PolicyPatchError

if TYPE_CHECKING:
    from policypatch.patch.artifact import Patch

console = Console(soft_wrap=True, highlight=False)
AS_IT_STANDS, MAPPED, TUNED = "as it stands", "mapped", "tuned"
LESS_FLUENT = 2.0  # times the new base's median perplexity


def register(add: Register) -> None:
    """Add the command."""
    add(rebase)


def rebase(
    patch: Annotated[Path, typer.Argument(help="a patch's folder")],
    old: Annotated[str, typer.Option("--from", help=f"the {MODEL} that it was made for")],
    new: Annotated[str, typer.Option("--to", help=f"the {MODEL} that it is carried to")],
    out: Annotated[Path, typer.Option(help="folder of the new patch")],
    share: Annotated[float, typer.Option(help="of the steps a new patch takes, for the fine-tune; 0: none")] = 0.1,
    version: Annotated[str | None, typer.Option(help="of the new patch; the old one's")] = None,
    key: Annotated[Path | None, typer.Option(help="public key that must have signed it")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as run.py takes it")] = None,
) -> None:
    """Carry a patch over as it stands, by a linear map between the embeddings, and by a short fine-tune from there.

    All are measured on the new base, and the one with the least of the patch's own risk is written, its manifest
    bound to the new base and the old patch its parent; but none whose text is much less fluent than the base's, if
    another is not. They are compared on the same prompts as the scorecard reports.
    """
    from policypatch.files.cache import content_key
    from policypatch.logs import quiet_libraries
    from policypatch.patch.artifact import load, save
    from policypatch.patch.stacking import check_parts

    refuse_existing(out)
    if not 0 <= share <= 1:
        raise PolicyPatchError(f"--share is {share}: it must be a number from 0 to 1")
    quiet_libraries()
    given = load(patch, require_signature=key)
    check_parts([given])
    ways, told = _carried(given, old, new, version or given.manifest.version)
    risk = risk_overrides(given.manifest.risks)
    bound = ways[MAPPED].manifest.base
    about = {"patch": given.manifest.sha256, "to": asdict(bound), "share": share, "set": list(setting or [])}
    work = Path("outputs", "rebase", f"{given.manifest.name}-{content_key(**about)[:12]}")
    if share:
        ways[TUNED] = _tuned(ways[MAPPED], work, risk, new, share, list(setting or []))
    card, evaluate = _measured(ways, work, risk, new, list(setting or []))
    kept = _best(card, list(ways), given.manifest.risks)
    told |= {"figures": _say(card, list(ways), kept, given.manifest.scorecard)}
    told |= {"kept": kept, "share": share, "set": list(setting or [])}
    card.sort(key=lambda row: row["arm"] == kept)  # the last arm is the one that a scorecard is about
    manifest = replace(ways[kept].manifest, scorecard=card, training={"rebase": told, "evaluate": evaluate})
    save(replace(ways[kept], manifest=manifest), out)
    console.print(f"{out}: {kept}, for {bound.id}", markup=False)


def _carried(given: Patch, old: str, new: str, version: str) -> tuple[dict[str, Patch], dict[str, Any]]:
    """The ways that need no training, the simplest first, and how the map fits; both bases are let go again."""
    from policypatch.patch.artifact import check_base
    from policypatch.patch.lineage import derived
    from policypatch.rebase import carried

    before, after = base_of(old), base_of(new)
    check_base(given.manifest, before.identity, (), given.manifest.name)
    over = carried(given.vectors, before, after)
    fit = f"the map explains {over.explained:.1%} of the new embeddings' variance"
    console.print(f"{over.shared} tokens in common; {fit}", markup=False)
    vectors = {MAPPED: over.vectors}
    if given.vectors.shape[1] == after.width:
        vectors = {AS_IT_STANDS: given.vectors} | vectors
    ways = {name: derived(given, each, version=version, base=after.identity) for name, each in vectors.items()}
    return ways, {"from": asdict(before.identity), "shared_tokens": over.shared, "explained": over.explained}


def _tuned(start: Patch, work: Path, risk: list[str], model: str, share: float, setting: list[str]) -> Patch:
    """The mapped patch after a share of the steps that a new one takes, on the new base's own pairs."""
    from policypatch.launch import start as run
    from policypatch.patch.artifact import load, save

    folder = (work / "mapped").absolute()
    save(start, folder)
    plain = composed([*risk, *setting])
    steps = {f"{stage}.steps": max(1, round(share * plain[stage].steps)) for stage in ("sft", "dpo")}
    overrides = [
        *risk,
        *base_overrides(model),
        *("init=patch", f"init.folder={quoted(folder)}", f"patch.length={start.manifest.length}"),
        *("logger=csv", "others=none", "evaluate.costs.prompts=[]", "evaluate.after_sft=false"),
        *setting,
        *(f"{key}={value}" for key, value in steps.items()),
    ]
    run(composed(overrides), (work / "tuned").absolute(), "", overrides)
    made = load(work / "tuned" / "patch")
    return replace(start, vectors=made.vectors, manifest=replace(start.manifest, sha256=made.manifest.sha256))


def _measured(
    ways: Mapping[str, Patch], work: Path, risk: list[str], model: str, setting: list[str]
) -> tuple[list[dict[str, Any]], Any]:
    """The scorecard of the new base and of every way, and how much was measured."""
    from policypatch.evaluate.arms import evaluate_arms
    from policypatch.model.arm import Arm
    from policypatch.places import told_by_row
    from policypatch.prepare import prepare

    cfg = composed([*risk, *base_overrides(model), "method=none", "logger=csv", *setting])
    ready = prepare(cfg, len(next(iter(ways.values())).vectors))
    arms = [Arm("base"), *(Arm(name, vectors=way.vectors) for name, way in ways.items())]
    with told_by_row(cfg):
        card = evaluate_arms(
            ready.bench(cfg), [*ready.own, *ready.others], [], (marked_of_any(cfg, ready), ()), arms, work
        )
    return [asdict(row) for row in card], evaluate_settings(cfg)


def _best(card: Sequence[Mapping[str, Any]], ways: Sequence[str], risks: Sequence[str]) -> str:
    """The way with the least of the patch's risks, each as a share of the new base's; of equals the simplest.

    One behind which text is less fluent than `LESS_FLUENT` allows counts only where all are: noise has no risk either.
    """
    from policypatch.report.scorecard import groups_of, headline_line

    first = {group.risk: group for group in reversed(groups_of(card))}
    speaking = [headline_line(first[risk].lines, ways[-1]) for risk in risks if risk in first]
    lines = [line for line in speaking if line is not None]
    if not lines:
        raise PolicyPatchError("no figure of the risk was measured: nothing says which way is best")
    fluency = next((line for group in groups_of(card) for line in group.lines if line.metric == "ppl_median"), None)

    def rank(way: str) -> tuple[bool, float]:
        ruined = False
        if fluency is not None and "base" in fluency.cells:  # no figure at all: nothing was written
            value = fluency.cells[way]["value"] if way in fluency.cells else math.inf
            ruined = value > LESS_FLUENT * fluency.cells["base"]["value"]
        return ruined, sum(line.cells[way]["value"] / (line.cells["base"]["value"] or 1) for line in lines)

    return min(ways, key=rank)


def _say(
    card: Sequence[Mapping[str, Any]], ways: Sequence[str], kept: str, was: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The headline of every way, and what the patch did to its own base; gives both for the manifest."""
    from policypatch.report.scorecard import final_arm, groups_of, headline_line

    line = headline_line(groups_of(card)[0].lines, kept)
    assert line is not None
    what = f"{line.metric}" + (f" by {line.judge}" if line.judge else "")
    base = line.cells["base"]["value"]
    figures = {"of": what, "base": base, "ways": {way: line.cells[way]["value"] for way in ways}}
    for way in ways:
        mark = " *" if way == kept else ""
        console.print(f"{what}, {way}: {base:.3g} -> {line.cells[way]['value']:.3g}{mark}", markup=False)
    same = {r["arm"]: r["value"] for r in was if (r["metric"], r.get("judge")) == (line.metric, line.judge)}
    if was and (arm := final_arm(was)) in same and "base" in same:
        console.print(f"{what}, on its own base: {same['base']:.3g} -> {same[arm]:.3g}", markup=False)
        figures["on_its_own_base"] = [same["base"], same[arm]]
    return figures
