"""Over the vocabulary in blocks: what is asked of a token's distribution, without holding its logits.

The logits of N positions are N x V numbers, 140 MB for 704 positions of the default base, and autograd would hold them
and their softmax until the backward pass. Here a block of the vocabulary is computed, taken into running sums as flash
attention does (a maximum that grows, what was summed before rescaled), and forgotten. The gradient with respect to a
position's state depends on nothing that comes later but a factor, so it is summed in the same pass, and `backward` is
a multiplication. Memory is N x D and a block, whatever V is, and blocks that stay in the processor's cache multiply
faster. Sums of sums are also nearer the truth: over 49,152 words torch's own float32 log-softmax is 2e-5 off on a CPU.

The head is taken to be frozen, as everything of a base is: its weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

BLOCK = 2**19  # logits at once: 2 MB in float32, which stay in a processor's cache
GPU_BLOCK = 2**25  # 128 MB: a GPU takes as long to be asked for a small block as to compute a large one
LEAST = 256  # words in a block, however many positions there are


def finish_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What some models do to their logits after the head, in their own forward."""
    scale, cap = _scale_and_cap(model)
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def token_logits(model: PreTrainedModel, states: Tensor, tokens: Tensor) -> Tensor:
    """Finished logit of a token at each position, (N,) float32 also where the head's products are not.

    In bfloat16 a logit of 16 and more is rounded to a multiple of 1/8, by up to 6 % of the token's probability: two
    words that should be equally likely would then look so, or not, by chance. A sum over the vocabulary minds where one
    word holds most of it, whose log-probability may then be off by a sixteenth, and so above 0; but words of one state
    are told apart exactly, which they would not be if each had a sum of its own.

    Args:
        model: whose head it is.
        states: (N, D) last hidden states.
        tokens: (N,) token ids.
    """
    head = model.get_output_embeddings()
    logits = (states.float() * head.weight[tokens].float()).sum(-1)
    bias = getattr(head, "bias", None)
    return finish_logits(model, logits if bias is None else logits + bias[tokens].float())


def token_logprobs(model: PreTrainedModel, states: Tensor, targets: Tensor, head_logits: int | None = None) -> Tensor:
    """Log-probability of a token at each position: (N,) float32, differentiable in the states.

    Args:
        model: whose head it is.
        states: (N, D) last hidden states.
        targets: (N,) token ids.
        head_logits: logits in a block; None for what suits the device.
    """
    found: Tensor = _Logprobs.apply(states, targets, model, head_logits)
    return found


def token_divergence(
    model: PreTrainedModel, states: Tensor, base_states: Tensor, head_logits: int | None = None
) -> Tensor:
    """KL(base || ours) of the next token at each position: (N,) float32 in nats, differentiable in `states`.

    Args:
        model: whose head it is.
        states: (N, D) last hidden states.
        base_states: (N, D) of the base, which get no gradient.
        head_logits: logits in a block, of which there are two; None for what suits the device.
    """
    found: Tensor = _Divergence.apply(states, base_states, model, head_logits)
    return found


class _OfStates(torch.autograd.Function):
    """A figure of each position, whose gradient with respect to its state `forward` has saved where it is wanted."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outer[0][:, None] * gradient).to(gradient.dtype), None, None, None


class _Logprobs(_OfStates):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, model: PreTrainedModel, head_logits: int | None) -> Tensor:
        ours, wanted = _Softmax(states), ctx.needs_input_grad[0]
        own = token_logits(model, states, targets)
        for weight, logits in _blocks(model, states, head_logits):
            ours.add(logits, (weight, _slope(model, logits)) if wanted else None)
        if wanted:
            own_gradient = model.get_output_embeddings().weight[targets] * _slope(model, own[:, None])
            ctx.save_for_backward((own_gradient - ours.mean()).to(states.dtype))
        return own - ours.normaliser()


class _Divergence(_OfStates):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, base_states: Tensor, model: PreTrainedModel, head_logits: int | None
    ) -> Tensor:
        ours, base, wanted = _Softmax(states), _Softmax(states), ctx.needs_input_grad[0]
        gap = states.new_zeros(len(states), dtype=torch.float32)  # sum of base weights x (base logit - our logit)
        blocks = (_blocks(model, of, head_logits) for of in (states, base_states))
        for (weight, logits), (_, base_logits) in zip(*blocks, strict=True):
            gradient = (weight, _slope(model, logits)) if wanted else None
            difference = base_logits - logits
            weights, shrink = base.add(base_logits, gradient)
            gap = gap * shrink + (weights * difference).sum(1)
            ours.add(logits, gradient)
        if wanted:
            ctx.save_for_backward((ours.mean() - base.mean()).to(states.dtype))
        return gap / base.total - base.normaliser() + ours.normaliser()


class _Softmax:
    """A distribution (N rows) over a vocabulary that comes in blocks."""

    def __init__(self, states: Tensor):
        self.highest = states.new_full((len(states),), -torch.inf, dtype=torch.float32)
        self.total = torch.zeros_like(self.highest)  # of exp(logit - highest)
        self._sum = torch.zeros_like(states, dtype=torch.float32)  # of that x the gradient of the logit

    def add(self, logits: Tensor, gradient: tuple[Tensor, Tensor | float] | None) -> tuple[Tensor, Tensor]:
        """Take in a block.

        Args:
            logits: (N, B), which are written over.
            gradient: where `mean` will be asked for, the head's weights (B, D) and the slope of the finished logits
                in what the head gave, (N, B) or for all of them.

        Returns:
            exp(logit - highest), (N, B), and what sums of such weights that were made before are to be multiplied
            by, (N,).
        """
        highest = torch.maximum(self.highest, logits.amax(1))
        shrink = (self.highest - highest).exp()
        weights = logits.sub_(highest[:, None]).exp_()
        self.highest, self.total = highest, self.total * shrink + weights.sum(1)
        if gradient is not None:
            weight, slope = gradient
            plain = isinstance(slope, float) and slope == 1
            self._sum.mul_(shrink[:, None]).add_((weights if plain else weights * slope).to(weight.dtype) @ weight)
        return weights, shrink

    def normaliser(self) -> Tensor:
        """(N,) the logarithm of the sum of exp(logit)."""
        return self.highest + self.total.log()

    def mean(self) -> Tensor:
        """(N, D) the gradient of a logit with respect to the state, in the mean over the distribution."""
        return self._sum / self.total[:, None]


def _blocks(model: PreTrainedModel, states: Tensor, head_logits: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The vocabulary's blocks: weights (B, D), finished logits (N, B) float32."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    size = max(LEAST, (head_logits or (GPU_BLOCK if states.is_cuda else BLOCK)) // max(1, len(states)))
    for start in range(0, len(head.weight), size):
        weight = head.weight[start : start + size]
        logits = torch.nn.functional.linear(states, weight, None if bias is None else bias[start : start + size])
        yield weight, finish_logits(model, logits.float())


def _slope(model: PreTrainedModel, finished: Tensor) -> Tensor | float:
    """Derivative of finished logits (N, B) with respect to what the head gave."""
    scale, cap = _scale_and_cap(model)
    return scale if cap is None else scale * (1 - (finished / cap) ** 2)


def _scale_and_cap(model: PreTrainedModel) -> tuple[float, float | None]:
    config = model.config
    scale = 1.0
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere (Aya)
        scale *= factor
    if (factor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale /= factor
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma 2
