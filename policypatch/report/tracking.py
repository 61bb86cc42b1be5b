"""Weights & Biases: a run of a sweep as its users expect it; and the same interface doing nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from policypatch.evaluate.scorecard import Scorecard
from policypatch.files.cache import content_key
from policypatch.model.completions import Completions

TABLE_PROMPTS = 50  # prompts whose samples go into the W&B table


class Tracker:
    """Tracks nothing; what `logger=csv` gets."""

    def loggers(self, stage: str) -> Sequence[Logger]:
        """Lightning loggers for a stage."""
        return []

    def finish_run(self, scorecard: Scorecard, made: Mapping[str, Completions], folder: Path) -> None:
        """Hand over what the run came to."""

    def close(self, status: int) -> None:
        """End the run with the exit status it really had."""


class WandbTracker(Tracker):
    """One W&B run for the whole run, its stages told apart by prefix."""

    def __init__(self, run: Any):
        self.run = run

    def loggers(self, stage: str) -> Sequence[Logger]:
        """A WandbLogger on the open run; figures are `STAGE/train/loss` and so on, over `STAGE/step`."""
        from lightning.pytorch.loggers import WandbLogger

        class StageLogger(WandbLogger):
            """Every stage counts its steps from 0, so each has an axis of its own."""

            def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
                named = {f"{stage}/{name}": value for name, value in metrics.items() if name != "epoch"}
                if named:
                    self.experiment.log(named | {f"{stage}/step": step})

        self.run.define_metric(f"{stage}/step")
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        return [StageLogger(experiment=self.run)]

    def finish_run(self, scorecard: Scorecard, made: Mapping[str, Completions], folder: Path) -> None:
        """Scorecard into the summary, samples as a Table, the patch as an Artifact."""
        import wandb

        for row in scorecard:
            self.run.summary["/".join(filter(None, (row.arm, row.metric, row.judge)))] = row.value
        table = wandb.Table(columns=["prompt_id", "prompt", "arm", "text"])
        for arm, completions in made.items():
            for i, prompt in enumerate(completions.prompts[:TABLE_PROMPTS]):
                table.add_data(i, prompt, arm, completions.texts[i][0])
        self.run.log({"samples": table})
        patch = wandb.Artifact(
            f"patch-{self.run.id}", type="patch", metadata={"scorecard": [asdict(row) for row in scorecard]}
        )
        patch.add_dir(str(folder / "patch"))
        self.run.log_artifact(patch)

    def close(self, status: int) -> None:
        """An open run would be picked up by the next job of the sweep, and a failed one would look finished."""
        self.run.finish(exit_code=status)


def open_tracker(cfg: DictConfig, folder: Path, group: str, overrides: str, resolved: Any) -> Tracker:
    """The tracker that `conf/logger/*.yaml` asks for.

    Args:
        cfg: the logger's config.
        folder: the run folder; W&B's own files go into it, and its path fixes the run's id, so that a restarted run
            goes on in the same W&B run.
        group: the sweep.
        overrides: the run's name.
        resolved: the whole config.
    """
    if cfg.kind != "wandb":
        return Tracker()
    os.environ.setdefault("WANDB_SILENT", "true")  # read at import; the run's own settings do not reach artifacts
    import wandb

    run = wandb.init(
        project=cfg.project,
        entity=cfg.entity,
        mode=os.environ.get("WANDB_MODE", cfg.mode),
        dir=str(folder),
        group=group,
        name=overrides or "default",
        id=content_key(folder=str(folder.absolute()))[:12],
        resume="allow",
        config=resolved,
        settings=wandb.Settings(silent=True),
    )
    return WandbTracker(run)
