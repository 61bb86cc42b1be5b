"""`policypatch audit`: a patch measured again, on the customer's own base and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
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
    known_risk,
    quoted,
    risk_overrides,
    stack_overrides,
)
from policypatch.errors import PolicyPatchError

if TYPE_CHECKING:
    from policypatch.evaluate.drift import Change
    from policypatch.patch.manifest import Manifest

console = Console(soft_wrap=True, highlight=False)
MEASURED = ("prompts", "other_prompts", "k", "responses", "seed", "ppl_samples", "level", "resamples")
DRIFTED = 3  # exit status; 1 is a traceback's, 2 a user's mistake
SAMPLED = ("sampling", "response_sampling")
TOGETHER = {"squash", "rebase"}  # commands that measure all risks of a patch as its own
MEANING = ("k", "responses", "level", *SAMPLED)  # of these a figure means another thing with another value


def register(add: Register) -> None:
    """Add the command."""
    add(audit)


def audit(
    patches: Annotated[
        list[Path], typer.Argument(help="a patch's folder, or several in the order in which they stand")
    ],
    model: Annotated[str, typer.Option(help=MODEL)],
    risk: Annotated[str | None, typer.Option(help="a name of conf/risk/; that which the patch addresses")] = None,
    prompts: Annotated[Path | None, typer.Option(help="your own prompts (JSONL), in the place of the risk's")] = None,
    field: Annotated[str, typer.Option(help="field of --prompts that holds the prompt")] = "prompt",
    key: Annotated[Path | None, typer.Option(help="public key that must have signed every patch")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the report; outputs/audit/NAME-VERSION/DATE")] = None,
    history: Annotated[Path | None, typer.Option(help="file that the figures are added to, drawn beside it")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as run.py takes it")] = None,
) -> None:
    """Measure a patch as it was measured when it was made, and say what has changed since; exit status 3 if it has.

    Judges, prompts and metrics are this checkout's (conf/), as many as the patch's manifest says; nothing of a manifest
    but numbers is used. Where it has no such figure, as on prompts of your own, the oldest in --history that was
    measured with the same settings is what later ones are compared with.
    """
    from policypatch.evaluate.drift import changes
    from policypatch.files.atomic import read_json
    from policypatch.files.cache import occasion
    from policypatch.launch import start
    from policypatch.patch.artifact import load
    from policypatch.patch.stacking import check_parts
    from policypatch.report import history as audits

    loaded = [load(folder, require_signature=key) for folder in patches]
    check_parts(loaded)
    first = loaded[0].manifest
    known = audits.read(history) if history is not None else []
    overrides = [
        *([f"risk={risk}"] if risk else _risk(first)),
        *_measured_as(first.training),
        *base_overrides(model),
        *stack_overrides(patches),
        *("logger=csv", "name=audit", "evaluate.after_sft=false", "evaluate.costs.prompts=[]"),
        *(setting or []),
    ]
    cfg = composed(overrides)
    if prompts is not None:
        overrides += _own(cfg, prompts, field)
        cfg = composed(overrides)
    now = datetime.now(UTC)
    folder = out or Path("outputs", "audit", f"{first.name}-{first.version}", f"{now:%Y-%m-%d_%H-%M-%S}")
    with occasion():  # last month's answers are what today's are compared with, not today's
        start(cfg, folder.absolute(), "", overrides)
    rows = read_json(folder / "scorecard.json")
    identity = [asdict(patch.manifest.as_parent) for patch in loaded]
    settings = evaluate_settings(cfg)
    alike = [entry for entry in known if entry["patch"] == identity and entry.get("evaluate") == settings]
    scorecard = first.scorecard if len(loaded) == 1 else []
    if scorecard and (otherwise := _otherwise(first.training.get("evaluate"), settings)):
        console.print(f"measured with another {', '.join(otherwise)} than the manifest's figures, which are left out")
        scorecard = []
    reference = _reference(scorecard, alike)
    today = {arm: _of(rows, arm) for arm in ("base", "patch")}
    found = changes(reference, today, cfg.evaluate.level)
    say(found, sum(map(len, today.values())))
    drifted = [change for arm in found.values() for change in arm if change.differs]
    if history is not None:
        kept: dict[str, Any] = {
            "when": now.isoformat(timespec="seconds"),
            "patch": identity,
            "base": model,
            "risk": str(cfg.risk.name),
        }
        kept |= {"evaluate": settings, "drifted": len(drifted), "rows": rows, "report": str(folder / "report.html")}
        entries = audits.append(history, kept)
        console.print(f"{history} has {len(entries)} audits, drawn in {history.with_suffix('.svg')}", markup=False)
    if drifted:
        raise typer.Exit(DRIFTED)


def say(found: Mapping[str, Sequence[Change]], figures: int) -> None:
    """What has changed, a line for each, and how many were compared."""
    for arm, changes in found.items():
        for change in changes:
            if change.differs:
                risk, split, metric, judge = change.place
                what = f"{arm}: {risk} {split} {metric}" + (f" by {judge}" if judge else "")
                figures_told = f"{change.then:.3g} -> {change.now:.3g} (p = {change.p_value:.2g})"
                console.print(f"! {what}: {figures_told}", markup=False)
    compared = sum(map(len, found.values()))
    different = sum(change.differs for changes in found.values() for change in changes)
    if compared:
        console.print(f"{different or 'none'} of {compared} figures changed since", markup=False)
    if compared < figures:
        console.print(f"{figures - compared} figures have no earlier one to be compared with", markup=False)
    if any(change.differs for change in found["base"]):
        console.print(
            "the base itself answers otherwise than it did: another version of it, or of a package", markup=False
        )


def _reference(
    scorecard: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]
) -> dict[str, list[Mapping[str, Any]]]:
    """What today's figures are held against: the manifest's, and of those it has not the oldest audit's that has."""
    from policypatch.evaluate.drift import place_of

    earlier = [scorecard, *(entry["rows"] for entry in known)]
    found: dict[str, list[Mapping[str, Any]]] = {}
    for arm in ("base", "patch"):
        # The oldest figure of a place counts: audits on prompts of one's own may have come later than others.
        oldest = {place_of(row): row for rows in reversed(earlier) for row in _of(rows, arm)}
        found[arm] = list(oldest.values())
    return found


def _of(rows: Sequence[Mapping[str, Any]], arm: str) -> list[Mapping[str, Any]]:
    """A scorecard's figures of the base, or of what it is about; without those of what it costs."""
    from policypatch.evaluate.scorecard import COST
    from policypatch.report.scorecard import final_arm

    name = "base" if arm == "base" else final_arm(rows)
    return [row for row in rows if row["arm"] == name and row["risk"] != COST]


def _otherwise(then: object, now: Mapping[str, Any]) -> list[str]:
    """Settings of today's figures that are not the manifest's, by which these mean another thing."""
    if not isinstance(then, dict):
        return []
    known = [key for key in MEANING if key in then]
    return [key for key in known if then[key] != now[key] and not _within(then[key], now[key])]


def _within(then: object, now: Any) -> bool:
    """Whether all that an older manifest says of a setting with keys of its own is so today."""
    return isinstance(then, dict) and all(now.get(key) == value for key, value in then.items())


def _measured_as(training: Mapping[str, Any]) -> list[str]:
    """How much was measured when the patch was made, numbers alone: a manifest may come from anyone."""
    evaluate = training.get("evaluate")
    if not isinstance(evaluate, dict):
        return []
    numbers = {f"evaluate.{key}": evaluate[key] for key in MEASURED if key in evaluate}
    for key in SAMPLED:
        if isinstance(evaluate.get(key), dict):
            numbers |= {f"evaluate.{key}.{name}": value for name, value in evaluate[key].items() if name.isidentifier()}
    return [f"{key}={json.dumps(value)}" for key, value in numbers.items() if isinstance(value, int | float | None)]


def _risk(manifest: Manifest) -> list[str]:
    """The risk that a patch is measured by: all of its own where its figures are of them together."""
    trained = manifest.training.get("risk")
    joint = isinstance(trained, dict) and trained.get("name") == "joint"
    joint = joint or not TOGETHER.isdisjoint(manifest.training)
    return risk_overrides(manifest.risks) if joint else [f"risk={known_risk(manifest.risks)}"]


def _own(cfg: Any, prompts: Path, field: str) -> list[str]:
    """The overrides that put prompts in the place of the risk's sets."""
    from policypatch.files.atomic import file_sha256
    from policypatch.files.cache import content_key

    if not prompts.is_file():
        raise PolicyPatchError(f"there is no file {prompts}")
    if "parts" in cfg.risk:
        raise PolicyPatchError("the patch addresses several risks: say by --risk which of them --prompts are for")
    sets = cfg.risk.get("evaluation")
    if sets is None:
        raise PolicyPatchError(f"the risk {cfg.risk.name} has no sets to replace: give --set risk.prompts=FILE instead")
    own = f"{{_target_:policypatch.data.prompts.PromptSet,source:{quoted(prompts.absolute())},field:{quoted(field)}}}"
    # Called by what is in it: the history keeps figures of different prompts apart.
    name = f"own_{content_key(prompts=file_sha256(prompts), field=field)[:6]}"
    return [*(f"risk.evaluation.{known}=null" for known in sets), f"+risk.evaluation.{name}={own}"]
