"""Where and with what figures were measured."""

from __future__ import annotations

import os
import platform
import re
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from policypatch.outcome import commit

TELLING = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what a CPU multiplies matrices by


def about(*packages: str) -> dict[str, Any]:
    """The machine, and the versions of Python and of these packages."""
    name, flags = _processor()
    return {
        "machine": {
            "processor": name or platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": [flag for flag in TELLING if flag in flags],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def now() -> dict[str, str | None]:
    """The day, and the commit that is measured."""
    return {"date": date.today().isoformat(), "commit": commit()}


def _processor() -> tuple[str | None, list[str]]:
    """The CPU's name and what it can do, where the system says so (Linux)."""
    known = Path("/proc/cpuinfo")
    told = dict(re.findall(r"^(model name|flags)\s*:\s*(.*)$", known.read_text(), re.M)) if known.is_file() else {}
    return told.get("model name"), told.get("flags", "").split()
