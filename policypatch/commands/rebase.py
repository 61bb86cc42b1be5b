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
    from omegaconf import DictConfig
    from torch import Tensor

    from policypatch.evaluate.measure import Settings
    from policypatch.evaluate.probes import Probe
    from policypatch.patch.artifact import Patch
    from policypatch.prepare import Prepared

console = Console(soft_wrap=True, highlight=False)
AS_IT_STANDS, MAPPED, TUNED = "as it stands", "mapped", "tuned"
CHOOSING, REPORTED, OLD = "choosing", "reported", "own_base"  # folders of what was measured; OLD is an arm as well
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
    another is not. They are compared on every second prompt; the scorecard, and what share of the patch's reduction on
    its own base is kept, are of the others.
    """
    from policypatch.evaluate.measure import Settings
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
    choosing, card, evaluate = _measured(ways, work, risk, new, list(setting or []))
    kept = _best(choosing, list(ways), given.manifest.risks)
    before = _measured_before(given, work, risk, old, list(setting or []))
    certain = Settings(evaluate["level"], evaluate["resamples"])
    told |= {"figures": _say(card, before, list(ways), kept, given.manifest.risks, work, certain)}
    told |= {
        "kept": kept,
        "chosen_by": "every second prompt; the figures are of the others",
        "share": share,
        "set": list(setting or []),
    }
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
    if not given.manifest.base.differences(after.identity):
        raise PolicyPatchError(f"{new} is the base that {given.manifest.name} was made for: there is nothing to carry")
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
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any]:
    """Scorecards of the new base and of every way, on one half of the prompts and on the other; how much was measured.

    The best of several looks better than it is on the prompts that it was chosen by.
    """
    cfg, ready = _ready(risk, model, setting, max(len(way.vectors) for way in ways.values()))
    patches = {name: way.vectors for name, way in ways.items()}
    probes = [*ready.own, *ready.others]
    cards = [_card(cfg, ready, probes, which, patches, work / name) for which, name in enumerate((CHOOSING, REPORTED))]
    return cards[0], cards[1], evaluate_settings(cfg)


def _measured_before(given: Patch, work: Path, risk: list[str], model: str, setting: list[str]) -> list[dict[str, Any]]:
    """The patch's risks on its own base, on the prompts that the ways are reported on."""
    cfg, ready = _ready(risk, model, setting, len(given.vectors))
    return _card(cfg, ready, ready.own, 1, {OLD: given.vectors}, work / OLD)


def _ready(risk: list[str], model: str, setting: list[str], vectors: int) -> tuple[DictConfig, Prepared]:
    from policypatch.prepare import prepare

    plain = ("method=none", "logger=csv", "evaluate.costs.prompts=[]")
    # Companions that the fine-tune is asked to have are no matter of measuring.
    cfg = composed([*risk, *base_overrides(model), *plain, *setting, "patch.companions=[]"])
    return cfg, prepare(cfg, vectors)


def _card(
    cfg: DictConfig, ready: Prepared, probes: Sequence[Probe], which: int, patches: Mapping[str, Tensor], folder: Path
) -> list[dict[str, Any]]:
    """The scorecard of the base and of these on one half of the probes' prompts."""
    from policypatch.evaluate.arms import evaluate_arms
    from policypatch.evaluate.probes import half
    from policypatch.model.arm import Arm
    from policypatch.places import told_by_row

    arms = [Arm("base"), *(Arm(name, vectors=vectors) for name, vectors in patches.items())]
    halves, marked = [half(probe, which) for probe in probes], marked_of_any(cfg, ready)
    with told_by_row(cfg):
        return [asdict(row) for row in evaluate_arms(ready.bench(cfg), halves, [], marked, arms, folder)]


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
    card: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]],
    ways: Sequence[str],
    kept: str,
    risks: Sequence[str],
    work: Path,
    settings: Settings,
) -> list[dict[str, Any]]:
    """For each risk the figure that speaks, of every way and on the own base, and the share kept; for the manifest."""
    from policypatch.evaluate.drift import place_of
    from policypatch.evaluate.kept import kept as kept_of
    from policypatch.evaluate.scorecard import PER_PROMPT
    from policypatch.files.atomic import read_json
    from policypatch.report.metrics import reducible
    from policypatch.report.scorecard import groups_of, headline_line

    then, now = (read_json(work / folder / PER_PROMPT) for folder in (OLD, REPORTED))
    shares = {way: {of.place: of for of in kept_of(now, way, then, OLD, reducible(), settings)} for way in ways}
    first = {group.risk: group for group in reversed(groups_of(card))}
    figures = []
    for group in (first[risk] for risk in risks if risk in first):
        line = headline_line(group.lines, kept)
        if line is None:
            continue
        place = place_of(line.cells["base"])
        base = line.cells["base"]["value"]
        found: dict[str, Any] = dict(zip(("risk", "split", "metric", "judge"), place, strict=True))
        found |= {"base": base, "ways": {}}
        what = f"{line.metric}" + (f" by {line.judge}" if line.judge else "")
        for way in (way for way in ways if way in line.cells):
            share = shares[way].get(place)
            told = f": keeps {share.told()} of the reduction on its own base" if share else ""
            mark = " *" if way == kept else ""
            console.print(f"{what}, {way}: {base:.3g} -> {line.cells[way]['value']:.3g}{mark}{told}", markup=False)
            found["ways"][way] = {"value": line.cells[way]["value"], "kept": share.to_json() if share else None}
        same = {row["arm"]: row["value"] for row in before if place_of(row) == place}
        if OLD in same and "base" in same:
            console.print(f"{what}, on its own base: {same['base']:.3g} -> {same[OLD]:.3g}", markup=False)
            found["on_its_own_base"] = [same["base"], same[OLD]]
        figures.append(found)
    return figures
