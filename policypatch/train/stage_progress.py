"""How far a stage is, shown as every other part of a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import lightning as L
from lightning.pytorch.callbacks import Callback

from policypatch.progress import track


class StageProgress(Callback):
    """A bar, or lines, of a stage's steps."""

    def __init__(self, stage: str) -> None:
        self._stage, self._open = stage, ExitStack()
        self._advance: Callable[[int], None] = lambda n: None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin at the step that a stage goes on from."""
        shown = track(f"{self._stage} steps", trainer.max_steps, trainer.global_step)
        self._advance = self._open.enter_context(shown)

    def on_train_batch_end(self, *args: object) -> None:
        """One more."""
        self._advance(1)

    def on_train_end(self, *args: object) -> None:
        """It is over."""
        self._open.close()

    def on_exception(self, *args: object) -> None:
        """It is over as well."""
        self._open.close()
