"""SFT and DPO steps against TRL + PEFT, interleaved; the floor; memory; how a step grows.

Before anything is timed, both sides must compute the same loss and gradient on the same batch, and the same losses over
twenty steps.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.floor import matmul_rate, operations
from benchmarks.ours import Ours
from benchmarks.side import Side
from benchmarks.theirs import Theirs
from benchmarks.timing import Spread, in_turn, ratio, spread
from benchmarks.workload import Workload
from policypatch.model.base import Base
from policypatch.train.memory import peak_memory

Load = Callable[[], Base]
STEPS = 20  # over which the losses of both sides are compared
GROWTH: dict[str, tuple[int, ...]] = {
    "pairs": (2, 4, 8, 16, 32),
    "completion": (10, 19, 40, 80),
    "patch": (1, 10, 50, 100, 200),
}


def agreement(ours: Ours, theirs: Theirs) -> dict[str, float]:
    """Difference of losses, and of gradients relative to their length, before a step is taken."""
    mine, other = ours.backward(), theirs.backward()
    assert ours.vectors.grad is not None and theirs.vectors.grad is not None
    difference = (ours.vectors.grad - theirs.vectors.grad).norm() / theirs.vectors.grad.norm()
    return {"loss": abs(mine - other), "gradient": difference.item()}


def followed(ours: Ours, theirs: Theirs, steps: int = STEPS) -> float:
    """The most that the losses of both differ at any of the steps."""
    return max(abs(ours.step() - theirs.step()) for _ in range(steps))


def agreed(load: Load, work: Workload, name: str, tolerance: float) -> dict[str, float]:
    """How far both sides are apart on one batch and over twenty steps.

    Raises:
        SystemExit: further than `tolerance`.
    """
    ours, theirs = Ours(load(), work, name, STEPS), Theirs(load(), work, name, STEPS)
    found = agreement(ours, theirs) | {"loss_over_20_steps": followed(ours, theirs)}
    if max(found.values()) > tolerance:
        sys.exit(f"{name}: policypatch and TRL disagree ({found}): the timing would compare different work")
    return found


def stage(load: Load, work: Workload, name: str, repeats: int) -> dict[str, Any]:
    """Figures of one stage, whose sides are known to compute the same."""
    # TRL marks a base for checkpointing; apart from that neither side changes it.
    base, checkpointed = load(), load()
    sides: dict[str, Any] = {
        "ours": Ours(base, work, name, STEPS),
        "ours_compiled": Ours(load(), work, name, STEPS, True),
    }
    for suffix, precomputed in (("", False), ("_precomputed", True))[: 2 if name == "dpo" else 1]:
        for of, ending, kept in ((checkpointed, "", True), (base, "_without_checkpointing", False)):
            sides[f"trl{suffix}{ending}"] = Theirs(of, work, name, STEPS, precomputed, kept)
    ours = sides["ours"]
    found: dict[str, Any] = {}
    if base.model.device.type == "cuda":
        found["step_bytes"] = {side: step_bytes(runner) for side, runner in sides.items()}
        found["base_bytes"] = base.model.get_memory_footprint()
    seconds = in_turn({side: runner.step for side, runner in sides.items()}, repeats)
    tree = ours.batch().tree
    floor = operations(base.model, tree, work.patch) / matmul_rate(base.model, tree.tokens, 20 * repeats)
    computed = work.patch + tree.tokens
    return found | {
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "ratio": {side: ratio(values, seconds["ours"]) for side, values in seconds.items() if side != "ours"},
        "floor_s": floor,
        "floor_share": spread([floor / s for s in seconds["ours"]]),
        "tokens": computed,
        "tokens_per_s": spread([computed / s for s in seconds["ours"]]),
        "padding_share": tree.padding / computed,
    }


def step_bytes(side: Side) -> int:
    """The most that a step takes of a GPU's memory beside what is there before; a first one has allocated."""
    side.step()
    before = torch.cuda.memory_allocated()
    with peak_memory(torch.device("cuda")) as peak:
        side.step()
    return peak.bytes - before


def growth(load: Load, work: Workload, repeats: int) -> dict[str, dict[str, dict[str, Spread | float]]]:
    """Seconds of our DPO step, and its floor, as each part of the batch grows; sizes of a part are timed in turn."""
    base, found = load(), {}
    for part, sizes in GROWTH.items():
        runners = {str(size): Ours(base, work.but(**{part: size}), "dpo") for size in sizes}
        seconds = in_turn({size: runner.step for size, runner in runners.items()}, repeats)
        rate = matmul_rate(base.model, 512, 20 * repeats)
        found[part] = {
            size: {
                "seconds": spread(seconds[size]),
                "floor_s": operations(base.model, runner.batch().tree, len(runner.vectors)) / rate,
                "tokens": len(runner.vectors) + runner.batch().tree.tokens,
            }
            for size, runner in runners.items()
        }
    return found


def peaks(dtype: str, name: str) -> dict[str, int]:
    """Most bytes a process of its own holds that loads the base and takes a few steps, by side."""
    command = [sys.executable, "-m", "benchmarks.memory", "--dtype", dtype, "--stage", name]
    sides = ("none", "ours", "trl", "trl_without_checkpointing")
    return {side: int(subprocess.check_output([*command, "--side", side]).split()[-1]) for side in sides}
