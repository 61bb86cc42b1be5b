"""The most memory that a part of a run takes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


@dataclass
class Peak:
    """Bytes; 0 until the part is over."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The most memory held at any time within the block: of the GPU where `device` is one, else of the process.

    Where the kernel does not let a process start its own peak anew (it is Linux that does), the figure is the
    process's peak so far.
    """
    peak = Peak()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _start_anew()
    try:
        yield peak
    finally:
        peak.bytes = torch.cuda.max_memory_allocated(device) if on_gpu else _resident_peak()


def _start_anew() -> None:
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")  # proc(5): resets VmHWM to what is resident now


def _resident_peak() -> int:
    try:
        lines = (PROCESS / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
