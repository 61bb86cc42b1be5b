"""The most memory that a process takes which loads the base and trains a few steps, printed in bytes.

python -m benchmarks.memory --side ours|trl|trl_without_checkpointing|none --stage dpo --dtype float32

A side's packages are imported where it is built: no process holds the other side's.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.bases import default_base
from benchmarks.side import Side
from benchmarks.workload import Workload
from policypatch.model.base import Base
from policypatch.train.memory import peak_memory

STEPS = 3


def main() -> None:
    """Train, print the peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", required=True)
    parser.add_argument("--stage", default="dpo")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    base = default_base(arguments.dtype)
    with peak_memory(torch.device(base.model.device)) as peak:
        if arguments.side != "none":
            runner = runner_of(arguments.side, base, arguments.stage)
            for _ in range(STEPS):
                runner.step()
    sys.stdout.write(f"{peak.bytes}\n")


def runner_of(side: str, base: Base, stage: str) -> Side:
    """The side of this name."""
    if side == "ours":
        from benchmarks.ours import Ours

        return Ours(base, Workload(), stage)
    from benchmarks.theirs import Theirs

    return Theirs(base, Workload(), stage, checkpointing=side == "trl")


if __name__ == "__main__":
    main()
