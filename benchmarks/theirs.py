"""The same training step by TRL's trainers with PEFT prompt tuning.

The token ids are handed over as they are, so that both sides see the same sequences. Forward, reference and backward
are the trainer's own `training_step`; clipping and logging, which both sides have, are left out on both.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PromptTuningConfig, TaskType
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.side import Side
from benchmarks.workload import BETA, LEARNING_RATE, Workload
from policypatch.model.base import Base
from policypatch.model.tree import Item


class _AsTheyAre:
    """The dataset holds token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class _DPO(_AsTheyAre, DPOTrainer):
    pass


class _SFT(_AsTheyAre, SFTTrainer):
    pass


class Theirs(Side):
    """One stage on a base of its own: PEFT wraps the model that it is given.

    Args:
        base: loaded; with `checkpointing` it is marked for it, otherwise it stays as it is.
        work: what a step is.
        stage: `sft` or `dpo`.
        steps: different batches.
        precomputed: the reference is computed once, before the first step.
        checkpointing: of activations, as TRL does by default; without it a step takes more memory and less time.
    """

    def __init__(
        self,
        base: Base,
        work: Workload,
        stage: str,
        steps: int = 1,
        precomputed: bool = False,
        checkpointing: bool = True,
    ):
        items = work.items(base, steps)
        self._folder = tempfile.TemporaryDirectory()
        settings: dict[str, Any] = {
            "output_dir": self._folder.name,
            "per_device_train_batch_size": work.pairs,
            "learning_rate": LEARNING_RATE,
            "gradient_checkpointing": checkpointing,
            "bf16": base.model.dtype == torch.bfloat16,
            "use_cpu": base.model.device.type == "cpu",
            "report_to": [],
            "disable_tqdm": True,
        }
        tuning = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=work.patch)
        shared = {"model": base.model, "processing_class": base.tokenizer, "peft_config": tuning}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if stage == "dpo":
                args = DPOConfig(**settings, beta=BETA, max_length=None, precompute_ref_log_probs=precomputed)
                self.trainer = _DPO(args=args, train_dataset=_preferences(items), **shared)
            else:
                args = SFTConfig(**settings, max_length=None)
                self.trainer = _SFT(args=args, train_dataset=_prompts(items), **shared)
        self.trainer.current_gradient_accumulation_steps = 1  # `train` sets it
        self.trainer.model.train()
        (prompt,) = self.trainer.model.prompt_encoder.values()
        super().__init__(prompt.embedding.weight, steps)
        with torch.no_grad():
            self.vectors.copy_(work.vectors(base))
        rows = [self.trainer.train_dataset[i] for i in range(len(items))]
        self._rows = [rows[i : i + work.pairs] for i in range(0, len(rows), work.pairs)]

    def loss_of(self, batch: int) -> float:
        """As the trainer computes it."""
        padded = self.trainer.data_collator(self._rows[batch])
        return float(self.trainer.training_step(self.trainer.model, padded).detach())


def _preferences(items: Sequence[Item]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt_ids": list(item.prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}
            for item in items
            for chosen, rejected in (item.completions,)
        ]
    )


def _prompts(items: Sequence[Item]) -> Dataset:
    rows = []
    for item in items:
        prompt, chosen = item.prompt, item.completions[0]
        rows.append({"input_ids": [*prompt, *chosen], "labels": [-100] * len(prompt) + list(chosen)})
    return Dataset.from_list(rows)
