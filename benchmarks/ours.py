"""A training step of policypatch; the reference's log-probabilities are there before, as a sweep finds them."""

from __future__ import annotations

from benchmarks.side import Side
from benchmarks.workload import BETA, LEARNING_RATE, Workload
from policypatch.data.datamodule import Batch, Example, PairData
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.logprobs import item_logprobs
from policypatch.train.dpo_module import DPOModule, PreferenceSettings
from policypatch.train.module import Optimisation, StageModule
from policypatch.train.sft_module import SFTModule

ROW_TOKENS = {"cpu": 512, "cuda": 2048}  # a GPU has no use for short rows


class Ours(Side):
    """One stage on a base.

    Args:
        base: loaded.
        work: what a step is.
        stage: `sft` or `dpo`; DPO's reference is the base, as TRL has it for an adapter.
        steps: different batches.
        compiled: `trainer.compile`.
    """

    def __init__(self, base: Base, work: Workload, stage: str, steps: int = 1, compiled: bool = False):
        row_tokens = ROW_TOKENS[base.model.device.type]
        backbone = PrefixBackbone(base.model, work.vectors(base), row_tokens)
        backbone.compiled = compiled
        super().__init__(backbone.patch, steps)
        self.pairs = work.pairs
        items = work.items(base, steps)
        optimisation, reference = Optimisation(steps, LEARNING_RATE), None
        self.module: StageModule
        if stage == "dpo":
            self.module = DPOModule(backbone, optimisation, PreferenceSettings(BETA))
            reference = item_logprobs(base, None, items, row_tokens)
        else:
            self.module = SFTModule(backbone, optimisation)
        examples = [Example(item) for item in items]
        self.data = PairData(examples, work.pairs, steps, 0, 2 if stage == "dpo" else 1, backbone.tree, reference)

    def batch(self, number: int = 0) -> Batch:
        """Packed anew, as in a run."""
        return self.data.batch(range(number * self.pairs, (number + 1) * self.pairs))

    def loss_of(self, batch: int) -> float:
        """As the stage computes it."""
        rows = self.batch(batch).to(self.vectors.device)
        loss = self.module.losses(rows)["loss"].value
        loss.backward()
        return float(loss.detach())
