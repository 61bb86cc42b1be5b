"""What an arm costs: parameters, bytes, training, and the time to answer relative to the base."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from policypatch.evaluate.scorecard import COST, Row
from policypatch.files.arrays import array
from policypatch.model.arm import Arm
from policypatch.model.backbone import is_adapter
from policypatch.model.base import Base
from policypatch.model.latency import TIMING, Load, ratios
from policypatch.patch.artifact import TENSOR


@dataclass(frozen=True)
class Training:
    """What the stages took.

    Attributes:
        seconds: of both together.
        device_seconds: the same, summed over devices.
        peak_bytes: most memory of the process (of the GPU, where there is one) at any time of it.
    """

    seconds: float
    device_seconds: float
    peak_bytes: int

    @classmethod
    def sum(cls, stages: Sequence[tuple[float, float, int]]) -> Training:
        """Of the (seconds, device seconds, peak bytes) of each stage."""
        seconds, device_seconds, peaks = zip(*stages, strict=True)
        return cls(sum(seconds), sum(device_seconds), max(peaks))


def trainable(arm: Arm) -> int:
    """Numbers that training moved."""
    vectors = 0 if arm.vectors is None else arm.vectors.numel()
    return vectors + (0 if arm.lora is None else sum(tensor.numel() for tensor in arm.lora.tensors.values()))


def shipped(arm: Arm) -> int:
    """Bytes of the file that holds the arm's tensors."""
    tensors = {} if arm.lora is None else dict(arm.lora.tensors)
    tensors |= {} if arm.vectors is None else {TENSOR: arm.vectors.float()}
    return len(save(tensors)) if tensors else 0


def size_rows(arm: Arm, base: Base, training: Training | None) -> list[Row]:
    """Trainable parameters and their share of the base's, bytes of what is shipped, and what the training took."""
    count = trainable(arm)
    adapters = sum(p.numel() for name, p in base.model.named_parameters() if is_adapter(name))
    own = base.model.num_parameters() - adapters  # which knows that a byte of 4-bit weights holds two
    found = {"trainable_parameters": count, "parameter_share": count / own, "artifact_bytes": shipped(arm)}
    if training is not None:
        found |= {
            "train_seconds": training.seconds,
            "device_hours": training.device_seconds / 3600,
            "peak_memory_bytes": training.peak_bytes,
        }
    return [_row(arm, "training", metric, value, value, value, 1) for metric, value in found.items()]


def latency_rows(arm: Arm, base: Base, loads: Sequence[Load], repeats: int) -> list[Row]:
    """Time to the first token and for each further one as a ratio to the base: the median of pairs, their quartiles.

    For adapters once as they are and once merged into the weights. It depends on shapes and the machine alone, so the
    arms of a sweep that have the same shape share it through the cache. Not taken of another model in the base's place
    nor of what chooses among samples.
    """
    rows: list[Row] = []
    # Merging into 4-bit weights would round them anew, and the base would not be what it was afterwards.
    can_merge = arm.lora is not None and not getattr(base.model, "is_quantized", False)
    if arm.other is not None or arm.best_of > 1 or arm.guidance.turns:
        return rows
    for load in loads:
        for merged in (False, True) if can_merge else (False,):
            ending = "_merged" if merged else ""
            timed = _timed(arm, base, load, repeats, merged)
            for column, metric in enumerate(("first_token_ratio", "per_token_ratio")):
                low, value, high = np.quantile(timed[:, column], (0.25, 0.5, 0.75))
                rows.append(_row(arm, f"{load.prompt}x{load.batch}", metric + ending, value, low, high, repeats))
    return rows


def _timed(arm: Arm, base: Base, load: Load, repeats: int, merged: bool) -> np.ndarray:
    shape: dict[str, Any] = {"vectors": None if arm.vectors is None else arm.vectors.shape[0]}
    shape |= {"prompt": asdict(arm.guidance), "merged": merged}
    if arm.lora is not None:
        shape |= {"lora": {name: list(tensor.shape) for name, tensor in arm.lora.tensors.items()}}
    device = base.model.device
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor()} {platform.node()}"
    )
    about = {
        "base": asdict(base.identity),
        "dtype": str(base.model.dtype),
        "attention": base.model.config._attn_implementation,
        "shape": shape,
        "load": asdict(load),
        "repeats": repeats,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "timing": TIMING,
        "versions": [version(name) for name in ("torch", "transformers", "policypatch")],
    }
    return array("latency", about, lambda: ratios(base, arm, load, repeats, merged))


def _row(arm: Arm, split: str, metric: str, value: float, low: float, high: float, n: int) -> Row:
    return Row(arm.name, COST, split, None, metric, float(value), float(low), float(high), n)
