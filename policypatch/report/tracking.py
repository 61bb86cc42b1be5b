"""Weights & Biases: the stages of a run as its users expect them; and the same interface doing nothing."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from policypatch.evaluate.scorecard import Scorecard
from policypatch.files.atomic import read_jsonl, write_text
from policypatch.report.samples import judges_of

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 30.0  # of W&B's server
TABLE_PROMPTS = 50  # prompts of each risk and split whose samples go into the W&B table


class Job:
    """A stage of a run that nobody watches; what `logger=csv` gets."""

    def loggers(self) -> Sequence[Logger]:
        """Lightning loggers for the stage."""
        return []

    def reads(self, pairs: Path, counts: Mapping[str, int]) -> None:
        """Say which pairs the stage learns from."""

    def finds(self, scorecard: Scorecard, folder: Path) -> None:
        """Hand over what the run came to."""


class Tracker:
    """Tracks nothing."""

    @contextmanager
    def job(self, kind: str) -> Iterator[Job]:
        """A stage of the run: "sft", "dpo" or "eval". It has failed where the block raises."""
        yield Job()

    def close(self, status: int) -> None:
        """The run ends with this exit status."""


class WandbJob(Job):
    """One W&B run of a job type."""

    def __init__(self, run: Any, kind: str):
        self.run, self.kind = run, kind

    def loggers(self) -> Sequence[Logger]:
        """A WandbLogger on the open run; figures are `STAGE/train/loss` and so on, over `STAGE/step`."""
        from lightning.pytorch.loggers import WandbLogger

        stage = self.kind

        class StageLogger(WandbLogger):
            """Every stage counts its steps from 0, so each has an axis of its own."""

            def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
                named = {f"{stage}/{name}": value for name, value in metrics.items() if name != "epoch"}
                if named:
                    self.experiment.log(named | {f"{stage}/step": step})

        self.run.define_metric(f"{stage}/step", hidden=True)
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        for split in ("train", "val"):
            self.run.define_metric(f"{stage}/{split}/loss", step_metric=f"{stage}/step", summary="min")
        return [StageLogger(experiment=self.run)]

    def reads(self, pairs: Path, counts: Mapping[str, int]) -> None:
        """The pairs as an Artifact that the run uses: the same content is the same version for all runs of a sweep."""
        import wandb

        artifact = wandb.Artifact(f"pairs-{_tags(self.run.config)[0]}", type="preference-pairs", metadata=dict(counts))
        artifact.add_file(str(pairs))
        if self.run.offline:
            # `use_artifact` refuses offline, though a record of it is what `wandb sync` needs; this is what it calls.
            self.run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        else:
            self.run.use_artifact(artifact)

    def finds(self, scorecard: Scorecard, folder: Path) -> None:
        """Scorecard into the summary, samples as a Table, what was trained as an Artifact; the latter from `folder`."""
        import wandb

        self.run.summary.update(summary(scorecard))
        columns, rows = samples_table(folder / "samples.jsonl")
        self.run.log({"samples": wandb.Table(columns=columns, data=rows)})
        kind = next((kind for kind in ("patch", "peft") if (folder / kind).is_dir()), None)
        if kind is None:
            return
        config = self.run.config
        kind_of = "patch" if kind == "patch" else "lora"
        metadata = {"scorecard": [asdict(row) for row in scorecard], "seed": config["seed"], "tags": _tags(config)}
        artifact = wandb.Artifact(f"{kind_of}-{config['patch']['name']}", type=kind_of, metadata=metadata)
        artifact.add_dir(str(folder / kind))
        self.run.log_artifact(artifact, aliases=["latest", config["patch"]["version"], f"seed-{config['seed']}"])


class WandbTracker(Tracker):
    """A W&B run for each stage: one group for the sweep, a job type for the stage, tags for risk, model and method.

    Args:
        folder: the run folder, which W&B's files go into.
        options: of `wandb.init`, the same for all stages.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        self.folder, self.options, self.failed = folder, dict(options), False

    @contextmanager
    def job(self, kind: str) -> Iterator[Job]:
        """An open run would be picked up by the next, and one that failed look finished: it ends here in any case."""
        status, self.failed = 1, True  # until it is known to have gone well, wandb.init included
        agents = "WANDB_SWEEP_ID" in os.environ  # such an agent has one run, which all stages go on in
        own: dict[str, Any] = {} if agents else {"id": f"{run_id(self.folder)}-{kind}", "job_type": kind}
        run = self._begun(own)
        try:
            yield WandbJob(run, kind)
            status, self.failed = 0, False
        finally:
            run.finish(exit_code=status)

    def _begun(self, own: Mapping[str, Any]) -> Any:
        """An open run; an offline one where W&B cannot be reached, or does not know who asks: no run ends for that."""
        import wandb

        try:
            return wandb.init(**self.options, **own)
        except wandb.Error as error:
            if self.options["mode"] != "online":
                raise
            log.warning(
                "W&B cannot be used (%s): the run goes on offline; upload it with wandb sync %s/wandb/offline-run-*",
                str(error).splitlines()[0],
                self.folder,
            )
            self.options["mode"] = "offline"
            wandb.teardown()  # its service holds on to the run that was not begun
            return wandb.init(**self.options, **own)

    def close(self, status: int) -> None:
        """What failed outside of all stages is a failed evaluation: there is no patch."""
        if status == 0 or self.failed:
            return
        with suppress(_FailedOutside), self.job("eval"):
            raise _FailedOutside


class _FailedOutside(Exception):
    """Ends a W&B run as failed."""


def _tags(config: Mapping[str, Any]) -> list[str]:
    return [str(config[group]["name"]) for group in ("risk", "model", "method")]


def summary(scorecard: Scorecard) -> dict[str, float]:
    """The scorecard under keys that are each row's own.

    The first row's split, which speaks for the run, has ARM/METRIC/JUDGE; every other RISK/SPLIT/ARM/METRIC/JUDGE.
    """
    found: dict[str, float] = {}
    for row in scorecard:
        own = (row.risk, row.split) == (scorecard[0].risk, scorecard[0].split)
        place = () if own else (row.risk, row.split)
        name = "/".join(filter(None, (*place, row.arm, row.metric, row.judge)))
        bounds = {f"{name}/low": row.low, f"{name}/high": row.high, f"{name}/upper": row.upper}
        found |= {name: row.value} | {key: value for key, value in bounds.items() if value is not None}
    return found


def samples_table(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the W&B table: every arm's first continuation of the first TABLE_PROMPTS prompts.

    Of every risk and split as many, which then have columns of their own.

    Args:
        path: samples.jsonl.
    """
    samples = read_jsonl(path)
    judges = judges_of(samples)
    prompts: dict[tuple[Any, Any], dict[Any, None]] = {}  # numbers count within a risk and split
    for sample in samples:
        prompts.setdefault(_place(sample), {})[sample["prompt_id"]] = None
    kept = {place: set(list(numbers)[:TABLE_PROMPTS]) for place, numbers in prompts.items()}
    place_names = ["risk", "split"] if len(kept) > 1 else []
    own = [*place_names, "prompt_id", "prompt", "arm", "sample", "text"]
    rows = [
        [*(s.get(name) for name in own), *(s["scores"].get(judge) for judge in judges), s["ppl"]]
        for s in samples
        if s["sample"] == 0 and s["prompt_id"] in kept[_place(s)]
    ]
    return [*own, *(f"score/{judge}" for judge in judges), "ppl"], rows


def _place(sample: Mapping[str, Any]) -> tuple[Any, Any]:
    return sample.get("risk"), sample.get("split")


def run_id(folder: Path) -> str:
    """What the ids of the folder's W&B runs begin with: drawn once and kept in `folder`, so that a resumed run goes on
    in the same ones.

    A digest of the path would be the same on another machine, and for a sweep that is done again.
    """
    path = folder / "wandb_id"
    if path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    drawn = secrets.token_hex(4)
    write_text(path, drawn + "\n")
    return drawn


def open_tracker(cfg: DictConfig, folder: Path, group: str, overrides: str, resolved: Any) -> Tracker:
    """The tracker that `conf/logger/*.yaml` asks for.

    Args:
        cfg: the logger's config.
        folder: the run folder; W&B's own files go into it, and the run's id (`run_id`).
        group: the sweep.
        overrides: the run's name.
        resolved: the whole config.
    """
    if cfg.kind != "wandb":
        return Tracker()
    os.environ.setdefault("WANDB_SILENT", "true")  # read at import; the run's own settings do not reach artifacts
    import wandb

    options = {
        "project": cfg.project,
        "entity": cfg.entity,
        "mode": os.environ.get("WANDB_MODE", cfg.mode),
        "dir": str(folder),
        "group": group,
        "name": overrides or "default",
        "tags": _tags(resolved),
        "resume": "allow",
        "config": resolved,
        "settings": wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT_S),
    }
    return WandbTracker(folder, options)
