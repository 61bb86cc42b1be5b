"""`policypatch rebase`: a patch carried to another version of its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from policypatch.commands.base import MODEL, Register, base_of, base_overrides, composed, known_risk, quoted
from policypatch.errors import PolicyPatchError

if TYPE_CHECKING:
    from policypatch.model.base import Base
    from policypatch.patch.artifact import Patch

console = Console(soft_wrap=True, highlight=False)
AS_IT_STANDS, MAPPED, TUNED = "as it stands", "mapped", "tuned"


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
    bound to the new base and the old patch its parent.
    """
    from policypatch.logs import quiet_libraries
    from policypatch.patch.artifact import check_base, load, save
    from policypatch.rebase import carried

    if out.exists():
        raise PolicyPatchError(f"{out} exists: choose another --out")
    if not 0 <= share <= 1:
        raise PolicyPatchError(f"--share is {share}: it must be a number from 0 to 1")
    quiet_libraries()
    given = load(patch, require_signature=key)
    before, after = base_of(old), base_of(new)
    check_base(given.manifest, before.identity, (), str(patch))
    over = carried(given.vectors, before, after)
    console.print(
        f"{over.shared} tokens in common; the map explains {over.explained:.1%} of the new embeddings' variance",
        markup=False,
    )
    risk = known_risk(given.manifest.risks)
    work = Path(
        "outputs", "rebase", f"{given.manifest.name}-{given.manifest.sha256[:12]}-{after.identity.weights[:12]}"
    )
    ways = {MAPPED: _bound(given, over.vectors, after, version)}
    if given.vectors.shape[1] == after.width:
        ways = {AS_IT_STANDS: _bound(given, given.vectors, after, version)} | ways
    if share:
        ways[TUNED] = _tuned(ways[MAPPED], work, risk, new, share, list(setting or []))
    card = _measured(ways, work, risk, new, list(setting or []))
    kept = _best(card, list(ways))
    _say(card, list(ways), kept, given.manifest.scorecard)
    told = {"from": asdict(before.identity), "kept": kept, "shared_tokens": over.shared, "explained": over.explained}
    chosen = ways[kept]
    save(replace(chosen, manifest=replace(chosen.manifest, scorecard=card, training={"rebase": told})), out)
    console.print(f"{out}: {kept}, for {after.identity.id}", markup=False)


def _bound(given: Patch, vectors: Any, base: Base, version: str | None) -> Patch:
    """Vectors as a patch of the new base that comes from the given one."""
    from policypatch.patch.artifact import Patch, digest
    from policypatch.patch.manifest import Parent

    of = given.manifest
    manifest = replace(
        of,
        version=version or of.version,
        base=base.identity,
        width=vectors.shape[1],
        sha256=digest(vectors),
        parents=[Parent(of.name, of.version, of.sha256)],
        scorecard=[],
        training={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Patch(vectors, manifest)


def _tuned(start: Patch, work: Path, risk: str, model: str, share: float, setting: list[str]) -> Patch:
    """The mapped patch after a share of the steps that a new one takes, on the new base's own pairs."""
    from policypatch.launch import start as run
    from policypatch.patch.artifact import load, save

    folder = (work / "mapped").absolute()
    save(start, folder)
    plain = composed([f"risk={risk}", *setting])
    steps = {f"{stage}.steps": max(1, round(share * plain[stage].steps)) for stage in ("sft", "dpo")}
    overrides = [
        f"risk={risk}",
        *base_overrides(model),
        *("init=patch", f"init.folder={quoted(folder)}", f"patch.length={start.manifest.length}"),
        *("logger=csv", "others=none", "evaluate.costs.prompts=[]", "evaluate.after_sft=false"),
        *setting,
        *(f"{key}={value}" for key, value in steps.items()),
    ]
    run(composed(overrides), (work / "tuned").absolute(), "", overrides)
    made = load(work / "tuned" / "patch")
    return replace(start, vectors=made.vectors, manifest=replace(start.manifest, sha256=made.manifest.sha256))


def _measured(ways: Mapping[str, Patch], work: Path, risk: str, model: str, setting: list[str]) -> list[dict[str, Any]]:
    """The scorecard of the new base and of every way."""
    from policypatch.evaluate.arms import evaluate_arms
    from policypatch.evaluate.measure import Settings
    from policypatch.evaluate.probes import Bench
    from policypatch.model.arm import Arm
    from policypatch.prepare import prepare

    cfg = composed([f"risk={risk}", *base_overrides(model), "method=none", "logger=csv", *setting])
    ready = prepare(cfg)
    settings = Settings(cfg.evaluate.level, cfg.evaluate.resamples)
    bench = Bench(ready.base, ready.scorer, cfg.scorer.name, ready.plan, settings)
    arms = [Arm("base"), *(Arm(name, vectors=way.vectors) for name, way in ways.items())]
    return [asdict(row) for row in evaluate_arms(bench, [*ready.own, *ready.others], [], (), arms, work)]


def _best(card: Sequence[Mapping[str, Any]], ways: Sequence[str]) -> str:
    """The way with the least of the risk that the figures begin with; of equals the simplest."""
    from policypatch.report.scorecard import groups_of, headline_line

    line = headline_line(groups_of(card)[0].lines, ways[-1])
    if line is None:
        raise PolicyPatchError("no figure of the risk was measured: nothing says which way is best")
    return min(ways, key=lambda way: line.cells[way]["value"])


def _say(card: Sequence[Mapping[str, Any]], ways: Sequence[str], kept: str, was: Sequence[Mapping[str, Any]]) -> None:
    """The headline of every way, and what the patch did to its own base."""
    from policypatch.report.scorecard import final_arm, groups_of, headline_line

    line = headline_line(groups_of(card)[0].lines, kept)
    assert line is not None
    what = f"{line.metric}" + (f" by {line.judge}" if line.judge else "")
    base = line.cells["base"]["value"]
    for way in ways:
        mark = " *" if way == kept else ""
        console.print(f"{what}, {way}: {base:.3g} -> {line.cells[way]['value']:.3g}{mark}", markup=False)
    same = {r["arm"]: r["value"] for r in was if (r["metric"], r.get("judge")) == (line.metric, line.judge)}
    if was and (arm := final_arm(was)) in same and "base" in same:
        console.print(f"{what}, on its own base: {same['base']:.3g} -> {same[arm]:.3g}", markup=False)
