"""What a run leaves and says at its end: the artifact, its record, the scorecard on the terminal."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from policypatch.data.teachers import PairSet
from policypatch.evaluate.scorecard import Scorecard
from policypatch.files.atomic import read_json
from policypatch.files.cache import counters
from policypatch.home import CONF
from policypatch.methods import Method
from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.patch import artifact
from policypatch.patch.lineage import packages
from policypatch.patch.manifest import Manifest
from policypatch.patch.peft_layout import save_peft
from policypatch.report.costs import cost_sentence
from policypatch.report.headline import headline
from policypatch.report.table import scorecard_table

PACKAGES = ("policypatch", "lightning", "torch", "transformers", "hydra-core", "peft", "torchmetrics", "datasets")


def package(
    cfg: DictConfig,
    base: Base,
    arm: Arm,
    risks: list[str],
    method: Method,
    pair_set: PairSet,
    scorecard: Scorecard,
    resolved: Any,
    started: datetime,
    folder: Path,
) -> None:
    """Write what was trained: a patch as an artifact with all that is known of it, adapters as PEFT keeps them."""
    if arm.lora is not None:
        arm.lora.save(folder / "peft")
    if arm.vectors is None:
        return
    vectors = arm.vectors.float().cpu()
    manifest = Manifest(
        name=cfg.patch.name.lower(),
        version=cfg.patch.version,
        risks=risks,
        length=vectors.shape[0],
        width=vectors.shape[1],
        base=base.identity,
        sha256=artifact.digest(vectors),
        created=started.isoformat(timespec="seconds"),
        data_sha256=pair_set.sha256,
        parents=method.parents,
        training=_settings(resolved) | _company(method),
        scorecard=[asdict(row) for row in scorecard],
        packages=packages(*PACKAGES),
    )
    patch = artifact.Patch(vectors, manifest)
    artifact.save(patch, folder / "patch")
    save_peft(patch, folder / "peft")


def package_measured(patch: artifact.Patch, scorecard: Scorecard, resolved: Any, folder: Path) -> None:
    """Write a patch that had no scorecard yet, as a stack has none, with what was measured of it."""
    rows = [asdict(row) for row in scorecard]
    manifest = replace(patch.manifest, scorecard=rows, training=_settings(resolved))
    artifact.save(artifact.Patch(patch.vectors, manifest), folder / "patch")


def _company(method: Method) -> dict[str, Any]:
    """The patches that training had beside it, by what they are: the settings have their folders alone."""
    return {"companions": [asdict(companion) for companion in method.companions]} if method.companions else {}


def _settings(resolved: Any) -> dict[str, Any]:
    return {k: v for k, v in resolved.items() if k != "logger"}


def record(
    started: datetime, seconds: dict[str, float], pair_set: PairSet | None, arguments: list[str]
) -> dict[str, Any]:
    """What `run.json` holds."""
    return {
        "started": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "run.py", *arguments]),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": packages(*PACKAGES),
        "commit": commit(),
        "pairs": {} if pair_set is None else pair_set.counts,
        "cache": counters(),
    }


def commit() -> str | None:
    """The checkout's commit, with a mark where files differ from it; None where this is none."""
    if not (CONF.parent / ".git").exists():
        return None
    command = ["git", "-C", str(CONF.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def say(scorecard: Scorecard, folder: Path, level: float) -> None:
    """The scorecard and where everything is, for whoever waited."""
    console = Console()
    rows = [asdict(row) for row in scorecard]
    console.print(scorecard_table(rows, level))
    console.print(headline(rows, level))
    if costs := cost_sentence(rows):
        console.print(costs)
    hits = read_json(folder / "run.json")["cache"]
    console.print("cache: " + ", ".join(f"{k} {v['hits']} hit {v['misses']} made" for k, v in sorted(hits.items())))
    console.print(f"run folder: {folder}", soft_wrap=True)
