"""The bases that are timed."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from policypatch.model.base import Base
from policypatch.model.load import load_base

CONF = Path(__file__).parent.parent / "conf" / "model"


def default_base(dtype: str) -> Base:
    """The default base in this precision, a copy of its own."""
    return load_base(OmegaConf.merge(OmegaConf.load(CONF / "smollm2_135m.yaml"), {"dtype": dtype}))
