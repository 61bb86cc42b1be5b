"""Where and with what figures were measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch


def about(*packages: str) -> dict[str, Any]:
    """The machine, and the versions of these packages."""
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {name: version(name) for name in packages},
    }
