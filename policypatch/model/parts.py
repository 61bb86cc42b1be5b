"""What a transformers causal LM is made of and how far it reaches, whatever its architecture."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The LM without its head (`.model`, `.transformer`, ...)."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The LM's layers, in order; none where transformers does not mark them."""
    return [module for module in decoder_of(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def context_of(config: Any) -> int | None:
    """Positions that a model's config gives it, None where it sets no limit."""
    return getattr(config, "max_position_embeddings", None)


def sliding_window(model: PreTrainedModel) -> int | None:
    """How far back the model's sliding layers look; None where it has none (some configs say 0 for that)."""
    return getattr(model.config, "sliding_window", None) or None


def same_positions(model: PreTrainedModel) -> int | None:
    """How far positions go before rotary frequencies depend on the longest row of a batch; None: never.

    Beyond, what is computed for a row depends on who else is there.
    """
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "dynamic"):
        return None
    own = getattr(model.config, "original_max_position_embeddings", None)
    return rope.get("original_max_position_embeddings") or own or model.config.max_position_embeddings
