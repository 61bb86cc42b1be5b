"""One run, read top to bottom: pairs -> SFT -> DPO -> evaluate -> package -> report."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from policypatch import ranks
from policypatch.errors import ForeignFolder
from policypatch.evaluate.arms import evaluate_arms
from policypatch.evaluate.costs import Training, latency_rows, size_rows
from policypatch.evaluate.scorecard import Row, Scorecard
from policypatch.files.atomic import TEMPORARY, remove, write_json, write_text
from policypatch.files.cache import reset_counters
from policypatch.logs import quiet_libraries
from policypatch.methods import StackMethod, Trained, Untrained
from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.model.latency import Load
from policypatch.outcome import PACKAGES, package, package_measured, record, say
from policypatch.patch.lineage import packages
from policypatch.places import told_by_row
from policypatch.prepare import Prepared, prepare
from policypatch.progress import Clock
from policypatch.report.records import FAILED
from policypatch.report.run_report import write_report
from policypatch.report.tracking import Tracker, open_tracker
from policypatch.settings import check
from policypatch.train.cost import stage_cost
from policypatch.training import trained_arms

log = logging.getLogger(__name__)

AFTER_TRAINING = ("others", "scorer", "evaluate")  # top-level keys that no stage of the training reads
PROMPTS = ("prompts", "other_prompts")  # but these of `evaluate`: what is measured on is never trained on


def run(cfg: DictConfig, folder: Path, overrides: str, arguments: list[str]) -> Scorecard:
    """Make a patch and its scorecard in `folder`; every rank calls it (`policypatch.launch`).

    Called again on a folder that an interrupted run left, it takes up where that one stopped.

    Args:
        cfg: the composed config.
        folder: the run folder; created.
        overrides: the job's overrides in one line, the run's name in W&B.
        arguments: the job's overrides one by one, for the record of the command.

    Raises:
        PolicyPatchError: in one sentence, before the expensive part wherever that is possible.
    """
    check(cfg)
    ranks.agree(lambda: packages(*PACKAGES))
    quiet_libraries()
    started = datetime.now(UTC)
    reset_counters()
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    _refuse_foreign_folder(folder, resolved)
    ranks.once(lambda: _clear(folder))
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.trainer.threads is not None:
        torch.set_num_threads(cfg.trainer.threads)
    clock = Clock()
    tracker = open_tracker(cfg.logger, folder, cfg.name, overrides, resolved) if ranks.first() else Tracker()
    status = 1
    try:
        with clock("load"):
            ready = prepare(cfg)
            write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved)))
        arms, pair_set, training = [Arm("base")], None, None
        if isinstance(ready.method, Trained):
            with told_by_row(cfg):
                pair_set = trained_arms(cfg, ready, ready.method, arms, clock, tracker, folder)
            training = Training.sum([stage_cost(folder, stage) for stage in ("sft", "dpo")])
        elif isinstance(ready.method, Untrained):
            arms += ready.method.arms(ready.teachers)
        with tracker.job("eval") as job:
            scorecard = _measured(cfg, ready, arms, training, clock, folder)

            def leave() -> None:
                if pair_set is not None:
                    job.reads(folder / "pairs.jsonl", pair_set.counts)
                    with clock("package"):
                        risks = [part.risk.name for part in ready.parts]
                        made = (risks, ready.method, pair_set, scorecard, resolved, started)
                        package(cfg, ready.base, arms[-1], *made, folder)
                elif isinstance(ready.method, StackMethod) and not ready.method.patch.manifest.scorecard:
                    package_measured(ready.method.patch, scorecard, resolved, folder)
                write_json(folder / "run.json", record(started, clock.seconds, pair_set, arguments))
                write_report(folder)
                job.finds(scorecard, folder)

            ranks.once(leave)
        status = 0
    finally:
        tracker.close(status)
    if ranks.first():
        say(scorecard, folder, cfg.evaluate.level)
    return scorecard


def _clear(folder: Path) -> None:
    """Remove what an earlier attempt has left unfinished, and that it failed."""
    (folder / FAILED).unlink(missing_ok=True)
    for path in folder.rglob(f"{TEMPORARY}*"):
        remove(path)


def _refuse_foreign_folder(folder: Path, resolved: Any) -> None:
    """Refuse a folder that holds a run of another configuration.

    One that did not finish may be taken up with another evaluation: its training stands.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return
    finished = (folder / "run.json").is_file()
    if _bound(OmegaConf.to_container(OmegaConf.load(path)), finished) != _bound(resolved, finished):
        raise ForeignFolder(f"{folder} holds a run of another configuration: choose another name=, or remove it")


def _bound(config: Any, finished: bool) -> dict[str, Any]:
    """The part of a config that a folder is bound to; where a run works and is logged never is."""
    free = ("logger",) if finished else ("logger", *AFTER_TRAINING)
    bound = {key: value for key, value in config.items() if key not in free}
    bound["trainer"] = {"validate_every": config["trainer"]["validate_every"]}
    return bound if finished else bound | {f"evaluate.{key}": config["evaluate"].get(key) for key in PROMPTS}


def _measured(
    cfg: DictConfig, ready: Prepared, arms: list[Arm], training: Training | None, clock: Clock, folder: Path
) -> Scorecard:
    """Ask the first arm, the last one, and that between the stages if that is asked for; then what the last costs.

    Arms that no training leads to follow from none another: all of them are ends, asked everything and timed.
    """
    ends = arms[1:] if isinstance(ready.method, Untrained) else arms[1:][-1:]
    asked = arms if cfg.evaluate.after_sft else [arms[0], *ends]
    with clock("evaluate"), told_by_row(cfg):
        probes = ready.own, ready.others
        scorecard = evaluate_arms(ready.bench(cfg), *probes, ready.marked, asked, folder, [arms[0], *ends])
    if ends:
        with clock("costs"):
            for arm in ends:
                scorecard += size_rows(arm, ready.base, training)
                scorecard += ranks.once(partial(_timed, cfg, ready.base, arm))
            scorecard.save(folder / "scorecard.json")
    return scorecard


def _timed(cfg: DictConfig, base: Base, arm: Arm) -> list[Row]:
    """How long an arm takes to answer, none where that cannot be found out."""
    costs = cfg.evaluate.costs
    loads = [Load(prompt, batch) for prompt in costs.prompts for batch in costs.batches]
    try:
        return latency_rows(arm, base, loads, costs.repeats)
    except RuntimeError as error:  # a GPU without room for the largest batch must not cost the patch
        log.warning("answering was not timed: %s", error)
        return []
