"""What the training of a stage takes, over all attempts: it is kept in the checkpoints, with what it was spent on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from policypatch import ranks
from policypatch.files.atomic import read_json, write_json
from policypatch.train.memory import Peak, peak_from_now

COST = "cost.json"  # beside a stage's checkpoints


class Cost(Callback):
    """Seconds of training, the same summed over devices, and the most memory held in it.

    Args:
        device: where it is trained.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.device_seconds, self.most = 0.0, 0.0, 0  # of the attempts and parts that are over
        self.started = 0.0  # of the part that is not
        self.peak: Peak | None = None  # of this attempt, for as long as it trains

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Not called where a checkpoint is that of a stage's end."""
        self.started, self.peak = time.monotonic(), peak_from_now(self.device)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The figures stand."""
        self._add()
        self.peak = None

    def _add(self) -> None:
        if self.peak is not None:
            now = time.monotonic()
            self.seconds += now - self.started
            self.device_seconds += (now - self.started) * ranks.size()  # which another attempt may have more or less of
            self.started = now
            self.most = max(self.most, self.peak.bytes)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        self._add()
        return {"seconds": self.seconds, "device_seconds": self.device_seconds, "peak_bytes": self.most}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint that an attempt goes on from."""
        self.seconds, self.device_seconds, self.most = figures_of(state)

    def save(self, folder: Path) -> None:
        """Write the figures beside the checkpoints."""
        write_json(folder / COST, self.state_dict())


def stage_cost(folder: Path, stage: str) -> tuple[float, float, int]:
    """Seconds of training, of all devices together, and most memory held in it; zeros where the stage was left out.

    Args:
        folder: of the run.
        stage: its name.
    """
    path = folder / "checkpoints" / stage / COST
    return figures_of(read_json(path)) if path.is_file() else (0.0, 0.0, 0)


def figures_of(state: dict[str, Any]) -> tuple[float, float, int]:
    """Seconds, those of all devices together, peak bytes; of before there were the second, one device's."""
    seconds = float(state["seconds"])
    return seconds, float(state.get("device_seconds", seconds)), int(state["peak_bytes"])
