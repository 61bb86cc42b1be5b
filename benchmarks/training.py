"""SFT and DPO steps against TRL + PEFT, interleaved; the floor; memory; how a step grows.

Before anything is timed, both sides must compute the same loss and gradient on the same batch, in float64 and float32,
and the same losses over twenty steps in float64. In float32 these drift apart by rounding, differently on every
machine: that drift stops no timing, and is told as a miss at the end, with an exit status, where it is more. How far
the sides are apart on a batch in the precision that is timed is told beside the times.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.bases import release
from benchmarks.floor import matmul_rate, operations
from benchmarks.ours import Ours
from benchmarks.side import Side
from benchmarks.theirs import Theirs
from benchmarks.timing import Spread, bracketed, in_turn, spread
from benchmarks.workload import Workload
from policypatch.model.base import Base
from policypatch.model.packed import can_compile
from policypatch.train.memory import peak_memory

Load = Callable[[], Base]
STEPS = 20  # over which the losses of both sides are compared
TOLERANCE = 1e-3  # of losses, and of gradients relative to their length
DRIFT = f"loss_over_{STEPS}_steps"
EXACT = 1e-4  # the same of a first batch in float64, of which rounding makes 2e-5 at most
GROWTH: dict[str, tuple[int, ...]] = {
    "pairs": (2, 4, 8, 16, 32),
    "prompt": (7, 14, 40, 80),
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
    """The most that the losses of both differ at any of the steps; NaN where one of them is."""
    return torch.tensor([ours.step() - theirs.step() for _ in range(steps)]).abs().max().item()


def agreed(load: Load, work: Workload, name: str) -> dict[str, dict[str, float]]:
    """How far both sides of a stage are apart on one batch and over twenty steps, in float64 and in float32.

    Args:
        load: a base in float32.
        work: what a step is.
        name: of the stage.

    Raises:
        SystemExit: further than the tolerance, or where it is not a number.
    """
    found = {}
    for dtype, loaded, most in (("float64", partial(doubled, load), EXACT), ("float32", load, TOLERANCE)):
        ours, theirs = both(loaded, work, name)
        first, drift = agreement(ours, theirs), followed(ours, theirs)
        found[dtype] = first | {DRIFT: drift}
        del ours, theirs
        release()
        drifted = dtype == "float64" and not drift <= TOLERANCE
        if drifted or not all(difference <= most for difference in first.values()):
            sys.exit(
                f"{name}: policypatch and TRL disagree in {dtype} ({found[dtype]}): timing would compare other work"
            )
    return found


def missed(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Stages (of `agreed`, by name) whose losses in float32 are further apart than is aimed at, in words."""
    drifts = {name: of["float32"][DRIFT] for name, of in found.items()}
    return [
        f"{name}: losses over {STEPS} steps in float32 are {drift:.1e} from TRL's, the aim is {TOLERANCE:.0e}"
        for name, drift in drifts.items()
        if not drift <= TOLERANCE
    ]


def doubled(load: Load) -> Base:
    """A base whose products are in float64; norms, log-probabilities and the patch stay in float32, on both sides."""
    base = load()
    base.model.double()
    return base


def both(load: Load, work: Workload, name: str) -> tuple[Ours, Theirs]:
    """The sides that are compared, each with a base of its own."""
    return Ours(load(), work, name, STEPS), Theirs(load(), work, name, STEPS)


def stage(load: Load, work: Workload, name: str, repeats: int) -> dict[str, Any]:
    """Figures of one stage, whose sides are known to compute the same; all of a turn take the same batch."""
    # TRL marks a base for checkpointing; apart from that neither side changes it.
    base, checkpointed = load(), load()
    ours = Ours(base, work, name, STEPS)
    sides: dict[str, Any] = {}
    if can_compile(base.model.device.type):
        sides["ours_compiled"] = Ours(load(), work, name, STEPS, True)
        for batch in range(repeats + 1):
            sides["ours_compiled"].step(batch)  # compiled for whatever shape is timed
    for suffix, precomputed in (("", False), ("_precomputed", True))[: 2 if name == "dpo" else 1]:
        for of, ending, kept in ((checkpointed, "", True), (base, "_without_checkpointing", False)):
            sides[f"trl{suffix}{ending}"] = Theirs(of, work, name, STEPS, precomputed, kept)
    found: dict[str, Any] = {"agreement": agreement(ours, sides["trl"])}
    if base.model.device.type == "cuda":
        found["step_bytes"] = {side: step_bytes(runner) for side, runner in {"ours": ours, **sides}.items()}
        found["base_bytes"] = base.model.get_memory_footprint()
    own, seconds, ratios = bracketed(ours.step, {side: runner.step for side, runner in sides.items()}, repeats)
    trees = [ours.batch(turn % STEPS).tree for turn in range(1, repeats + 1)]
    rate = matmul_rate(base.model, trees[0].tokens, 20 * repeats)
    floors = [operations(base.model, tree, work.patch) / rate for tree in trees]
    tokens = [work.patch + tree.tokens for tree in trees]
    runs = [(turn, s) for turn, of in enumerate(own) for s in of]
    return found | {
        "seconds": {side: spread(values) for side, values in ({"ours": [s for _, s in runs]} | seconds).items()},
        "ratio": {side: spread(values) for side, values in ratios.items()},
        "floor_s": spread(floors),
        "floor_share": spread([floors[turn] / s for turn, s in runs]),
        "tokens": spread([float(n) for n in tokens]),
        "tokens_per_s": spread([tokens[turn] / s for turn, s in runs]),
        "padding_share": sum(tree.padding for tree in trees) / sum(tokens),
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
