"""The most memory that a part of a run takes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


class Peak:
    """The most memory held so far; once the part is over, in all of it."""

    def __init__(self, read: Callable[[], int]):
        self._read, self._end = read, -1

    @property
    def bytes(self) -> int:
        """In bytes."""
        return self._read() if self._end < 0 else self._end

    def close(self) -> None:
        """What is held from now on is none of it."""
        self._end = self._read()


def peak_from_now(device: torch.device) -> Peak:
    """The most memory held from now on: of the GPU where `device` is one, else of the process.

    Where the kernel does not let a process start its own peak anew (it is Linux that does), the figure is the
    process's peak so far.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return Peak(lambda: int(torch.cuda.max_memory_allocated(device)))
    _start_anew()
    return Peak(_resident_peak)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The same of a block."""
    peak = peak_from_now(device)
    try:
        yield peak
    finally:
        peak.close()


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
