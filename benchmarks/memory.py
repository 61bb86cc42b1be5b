"""The most memory that a process takes which loads the base and trains a few steps, printed in bytes.

python -m benchmarks.memory --side ours|trl|trl_without_checkpointing|none --stage dpo --dtype float32
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.bases import default_base
from benchmarks.ours import Ours
from benchmarks.theirs import Theirs
from benchmarks.workload import Workload
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
            work, side = Workload(), arguments.side
            runner: Ours | Theirs
            if side == "ours":
                runner = Ours(base, work, arguments.stage)
            else:
                runner = Theirs(base, work, arguments.stage, checkpointing=side == "trl")
            for _ in range(STEPS):
                runner.step()
    sys.stdout.write(f"{peak.bytes}\n")


if __name__ == "__main__":
    main()
