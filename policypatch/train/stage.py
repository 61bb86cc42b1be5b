"""Running one stage: a Lightning Trainer around a StageModule, with checkpoints to resume from and metrics.csv."""

from __future__ import annotations

import csv
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from safetensors.torch import save_file

from policypatch import ranks
from policypatch.data.datamodule import PairData
from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import atomic_path, write_json
from policypatch.train.checkpoints import LAST, Checkpoints, WholeFiles, usable
from policypatch.train.cost import Cost
from policypatch.train.module import NotFiniteError, Optimisation, StageModule
from policypatch.train.stage_progress import StageProgress

log = logging.getLogger(__name__)

FIELDS = ("stage", "step", "metric", "value")
STAGES = ("sft", "dpo")


def read_figures(path: Path) -> list[dict[str, str]]:
    """Rows of a `metrics.csv`; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as f:
        return [row for row in csv.DictReader(f) if row["value"] is not None]  # None: killed while writing the line


def write_figures(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """A `metrics.csv` of these rows, stage by stage."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: _place(row["stage"])))


def _place(stage: str) -> int:
    """Where a run has the stage; others (squash) stand alone in their files."""
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


class MetricsCsv(Callback):
    """Append every logged figure to `metrics.csv` as (stage, step, metric, value)."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the file, or drop the rows that a resumed stage is about to write again.

        Not on_fit_start: Lightning calls that one before it restores the step.
        """
        rows = read_figures(self.path)
        write_figures(self.path, [r for r in rows if r["stage"] != self.stage or int(r["step"]) <= trainer.global_step])

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        """One row for each figure of the step, the whole batch's."""
        assert isinstance(module, StageModule)
        self._write(trainer, "train/", module.logged)  # Lightning keeps those of earlier steps, too

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        """One row for each figure on the held-out pairs."""
        if not trainer.sanity_checking:
            self._write(trainer, "val/")

    def _write(self, trainer: L.Trainer, split: str, names: Collection[str] | None = None) -> None:
        if not ranks.first():
            return
        with self.path.open("a", newline="") as f:
            for name, value in trainer.callback_metrics.items():
                if name.startswith(split) and (names is None or name in names):
                    csv.writer(f).writerow([self.stage, trainer.global_step, name, f"{value.item():.6g}"])
            f.flush()
            os.fsync(f.fileno())  # as the checkpoint of the step is: a machine that goes down loses neither


class OwnSignals(Callback):
    """Leave SIGTERM as it was before the trainer began.

    What a run has done is on disk, so it may end at once. Lightning would go on to the end of the step and have the
    ranks tell each other first, where one that is gone would be waited for; and it would end with status 0.
    """

    def __init__(self) -> None:
        self.before = signal.getsignal(signal.SIGTERM)
        self.raised = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Lightning has put its own handler in place by now, and may have taken note of a signal with it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)
            self._again(trainer)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """The handler is what it was; a stage that had no step to take never came to its start."""
        self._again(trainer)

    def _again(self, trainer: L.Trainer) -> None:
        if trainer.received_sigterm and not self.raised:
            self.raised = True
            signal.raise_signal(signal.SIGTERM)


def run_stage(
    module: StageModule,
    data: PairData,
    cfg: DictConfig,
    trainer_cfg: DictConfig,
    folder: Path,
    loggers: Sequence[Logger],
) -> int:
    """Train a stage to its end, from its last checkpoint where there is one.

    Args:
        module: the stage.
        data: its pairs.
        cfg: the stage's config (`conf/config.yaml`, `sft` or `dpo`).
        trainer_cfg: `conf/trainer/*.yaml`.
        folder: the run folder; checkpoints and the stage's cost go to `checkpoints/STAGE/`, figures to `metrics.csv`.
        loggers: what else is to hear of it.

    Returns:
        the step it ended at.

    Raises:
        PolicyPatchError: a loss was not finite; its batch and tensors lie beside the stage's checkpoints then.
    """
    backbone, device = module.backbone, module.backbone.model.device
    backbone.recompute, backbone.compiled = trainer_cfg.recompute, trainer_cfg.compile
    backbone.head_logits = trainer_cfg.head_logits
    last = folder / "checkpoints" / module.stage / LAST
    validated = trainer_cfg.validate_every if data.validation else 0
    figures, cost = MetricsCsv(folder / "metrics.csv", module.stage), Cost(device)
    checkpoints = Checkpoints(last, trainer_cfg.checkpoint_every, validated)
    callbacks = [OwnSignals(), figures, cost, checkpoints, StageProgress(module.stage)]
    trainer = L.Trainer(
        accelerator=trainer_cfg.accelerator,
        devices=ranks.size() // trainer_cfg.num_nodes,
        num_nodes=trainer_cfg.num_nodes,
        strategy="ddp" if ranks.size() > 1 else "auto",
        # Said here, or Lightning would requeue SLURM's jobs.
        plugins=[ranks.environment() or LightningEnvironment(), WholeFiles()],
        enable_checkpointing=False,  # ours are none of its own kind
        use_distributed_sampler=False,  # the data module deals out each batch
        max_steps=cfg.steps,
        max_epochs=-1,
        accumulate_grad_batches=1,
        gradient_clip_val=cfg.clip,
        val_check_interval=trainer_cfg.validate_every,
        check_val_every_n_epoch=None,
        limit_val_batches=0 if not data.validation else 1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=list(loggers),
        callbacks=callbacks,
        enable_progress_bar=False,  # one that looks like those of the other parts is among the callbacks
        enable_model_summary=False,
        deterministic=True,
        default_root_dir=folder,
    )
    resume = last if ranks.once(lambda: usable(last)) else None
    if resume:
        log.info("%s resumes from %s", module.stage, last)
    with warnings.catch_warnings():
        # Lightning cannot see that the loader starts where the checkpoint stopped.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        started = time.monotonic()
        try:
            with backbone.at_work():
                trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        except NotFiniteError as error:
            raise PolicyPatchError(f"{error}; {_evidence(error, module, last.parent)} has the batch") from error
        finally:
            torch.use_deterministic_algorithms(False)  # a setting of the whole process, which sampling on a GPU refuses
    if module.tokens:
        share, seconds = module.padding / module.tokens, time.monotonic() - started
        report = "%s: %d tokens, %.1f %% of them padding, in %.0f s with what validation takes, %.0f a second"
        log.info(report, module.stage, module.tokens, 100 * share, seconds, module.tokens / seconds)
    cost.save(last.parent)
    trainer.save_checkpoint(last)  # a run that is interrupted later does not train this stage again
    module.to(device)  # Lightning leaves a module, and with it the frozen base, on the CPU
    return trainer.global_step


def _evidence(error: NotFiniteError, module: StageModule, folder: Path) -> Path:
    """Write down what a loss that is not finite was computed from: lines of pairs.jsonl, figures, and tensors."""
    found = {name: str(figure.value.item()) for name, figure in error.figures.items()}  # as text: JSON has no NaN
    lines = sorted({row + 1 for rows in ranks.gather(error.batch.pairs) for row in rows})
    path = folder / "not_finite.json"
    write_json(path, {"step": error.step, "lines_of_pairs": lines, "figures": found})
    with atomic_path(path.with_suffix(".safetensors")) as temporary:
        tensors = module.backbone.state_dict()
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    return path


def optimisation(cfg: DictConfig) -> Optimisation:
    """The part of a stage's config that says how its tensors move."""
    return Optimisation(cfg.steps, cfg.lr, cfg.warmup, cfg.decay, cfg.weight_decay, tuple(cfg.betas))
