"""What all training stages share: one backbone, AdamW, warm-up, and checkpoints that hold the patch alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from policypatch import ranks
from policypatch.data.datamodule import Batch
from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.sharded import levelled
from policypatch.train.figures import LOSS, Figure, over_ranks, share_of_loss


@dataclass(frozen=True)
class Optimisation:
    """How a stage's trainable tensors move. Every field is a config key of the stage.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate, reached after warm-up.
        warmup: share of the steps over which the rate rises linearly from 0.
        decay: "linear" to 0, "cosine" to 0, or "constant".
        weight_decay: AdamW's; pulls the vectors towards 0, so 0 by default.
        betas: AdamW's running averages.
    """

    steps: int
    lr: float
    warmup: float = 0.1
    decay: str = "linear"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)


def rate_at(o: Optimisation) -> Callable[[int], float]:
    """The factor on the peak learning rate at each step (0-based)."""
    warm = max(1, round(o.warmup * o.steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        left = max(0.0, (o.steps - step) / max(1, o.steps - warm))
        if o.decay == "linear":
            return left
        if o.decay == "cosine":
            return 0.5 - 0.5 * float(torch.cos(torch.tensor(left * torch.pi)))
        return 1.0

    return factor


class NotFiniteError(PolicyPatchError):
    """A loss became NaN or infinite; with the batch and the figures of it."""

    def __init__(self, message: str, step: int, batch: Batch, figures: Mapping[str, Figure]):
        super().__init__(message)
        self.step, self.batch, self.figures = step, batch, figures


class StageModule(L.LightningModule, ABC):
    """A training stage around the shared backbone. Subclasses say what its loss is.

    Args:
        backbone: the frozen base behind the trainable patch.
        optimisation: how the patch moves.
    """

    stage = ""

    def __init__(self, backbone: PrefixBackbone, optimisation: Optimisation):
        super().__init__()
        if optimisation.decay not in ("linear", "cosine", "constant"):
            raise PolicyPatchError(f"{self.stage}.decay is {optimisation.decay!r}: choose linear, cosine or constant")
        self.backbone = backbone
        self.optimisation = optimisation
        self.logged: set[str] = set()  # this step's figures: not every batch has all
        self.tokens = self.padding = 0  # of the trees that this attempt has trained on, and how many of them were none

    def configure_optimizers(self) -> Any:
        """AdamW on the trainable tensors with the stage's schedule, stepped at every optimiser step."""
        o = self.optimisation
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trainable, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
        schedule = LambdaLR(optimiser, rate_at(o))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @abstractmethod
    def losses(self, batch: Batch) -> Mapping[str, Figure]:
        """The figures of a batch; `loss` is the one to minimise."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; a loss that is not finite ends the run rather than poisoning the patch."""
        self.backbone.begin(self.global_step)
        ours, figures = over_ranks(self.losses(batch), batch.counts)
        loss = figures[LOSS].value
        if not torch.isfinite(loss):
            message = (
                f"the {self.stage} loss became {loss.item()} at step {self.global_step}: lower {self.stage}.lr "
                f"(now {self.optimisation.lr}) or {self.stage}.clip"
            )
            raise NotFiniteError(message, self.global_step, batch, figures)
        self._log("train", figures)
        for tree in (batch.tree, batch.texts, batch.balanced):
            if tree is not None:
                self.tokens += tree.tokens
                self.padding += tree.padding
        return levelled(self.backbone.model, share_of_loss(ours, figures, ranks.size()), self.backbone.patch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same figures on held-out rows."""
        self.backbone.begin(None)
        self._log("val", over_ranks(self.losses(batch), batch.counts)[1])

    def _log(self, split: str, figures: Mapping[str, Figure]) -> None:
        self.logged = {f"{split}/{name}" for name in figures}
        for name, figure in figures.items():
            held_out = split == "val"
            self.log(
                f"{split}/{name}",
                figure.value.detach(),
                batch_size=figure.rows,
                on_step=not held_out,
                on_epoch=held_out,
                sync_dist=held_out,  # all ranks have the same; Lightning warns where it is not asked to make sure
            )
