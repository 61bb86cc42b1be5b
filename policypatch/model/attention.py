"""Attention that stands in for a model's own, and has that do the work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KINDS = ("sdpa", "eager")  # attention that takes any mask and any number of keys, so that another may stand in for it


def register(name: str, attend: Callable[..., Any], kind: str) -> None:
    """Have transformers know `attend` by this name, with masks as `kind` takes them."""
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])


def attention_of(layer: type, kind: str) -> Any:
    """What a class of attention layer computes by; eager attention is a function in the class' own file."""
    eager = getattr(sys.modules[layer.__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager)
