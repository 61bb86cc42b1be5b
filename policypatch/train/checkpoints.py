"""Checkpoints of a stage: the trainable tensors, the optimiser and what it took, whole or not there."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from policypatch.files.atomic import atomic_path

log = logging.getLogger(__name__)

LAST = "last.ckpt"


class Checkpoints(Callback):
    """Write `last.ckpt` every so many steps, after whatever else belongs to the step: a run goes on behind it.

    Lightning's own callback would write it before the step's validation, whose figures a run that is killed then would
    lack in the end.

    Args:
        path: the file.
        every: optimiser steps.
        validated: after how many steps the held-out rows are looked at, 0 for never.
    """

    def __init__(self, path: Path, every: int, validated: int) -> None:
        self.path, self.every, self.validated = path, every, validated

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """A step is over, unless it is validated."""
        if not self.validated or trainer.global_step % self.validated:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Now it is."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path)


class WholeFiles(TorchCheckpointIO):
    """Renames a checkpoint into its place once it is on the disk; Lightning may copy it there from another one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See Lightning's."""
        with atomic_path(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def usable(checkpoint: Path) -> bool:
    """Whether there is a checkpoint to go on from; one that a disk has damaged is removed.

    torch does not look at the checksums of its zip file, and zipfile not at all that torch does.
    """
    if not checkpoint.is_file():
        return False
    content = checkpoint.read_bytes()  # a disk that does not answer now has not damaged it
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damage = archive.testzip()
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # both have a dozen for bytes that are no checkpoint, UnicodeDecodeError among them
        damage = f"{type(error).__name__}: {error}"
    if damage is None:
        return True
    log.warning("%s is damaged (%s): the stage is trained from its beginning", checkpoint, damage)
    checkpoint.unlink()
    return False
