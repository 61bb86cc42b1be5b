"""The least time a training step can take: the operations that it cannot do without, at the machine's own matmul rate.

A step has to read every unique token of its tree once, forward and backward to its input (no weight gets a gradient),
and the head once in each direction wherever a completion token is predicted. Attention, norms and activations count as
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.timing import timed
from policypatch.model.parts import decoder_of
from policypatch.model.tree import Tree


def operations(model: PreTrainedModel, tree: Tree, patch: int) -> int:
    """Of a step's matrix products."""
    tokens = patch + tree.tokens - tree.padding
    layers = sum(weight.numel() for weight in _weights(model))
    return 4 * (tokens * layers + len(tree.targets) * model.get_output_embeddings().weight.numel())


def matmul_rate(model: PreTrainedModel, tokens: int, repeats: int) -> float:
    """Operations a second of the layers' largest product, (tokens, D) x (D, F): the best of `repeats`."""
    weight = max(_weights(model), key=torch.numel)
    states = torch.randn(tokens, weight.shape[1]).to(weight)
    with torch.inference_mode():
        best = min(timed(lambda: torch.nn.functional.linear(states, weight)) for _ in range(repeats))
    return 2 * tokens * weight.numel() / best


def _weights(model: PreTrainedModel) -> list[Tensor]:
    """Matrices of the layers."""
    embedding = model.get_input_embeddings().weight
    return [p for p in decoder_of(model).parameters() if p.dim() == 2 and p is not embedding]
