"""What an applied patch costs its user: `generate` with `policypatch.apply` against the plain model, in turn."""

from __future__ import annotations

import statistics
import time

import torch
from transformers.generation.streamers import BaseStreamer

from policypatch.model.applied import apply, remove
from policypatch.model.base import Base

PROMPT, NEW_TOKENS, PATCH = 32, 256, 50


class Clock(BaseStreamer):
    """When the prompt was handed over and each token came."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called once for the prompt, then for every token."""
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def measured(base: Base) -> tuple[float, float]:
    """Seconds to the first token, and for each further one."""
    ids = torch.randint(100, base.embedding.shape[0], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    clock = Clock()
    base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=base.eos[0],
        streamer=clock,
    )
    first, *_, last = clock.ticks[1:]
    return first - clock.ticks[0], (last - first) / (len(clock.ticks) - 2)


def overhead(base: Base, repeats: int) -> dict[str, dict[str, float]]:
    """Ratio patched / plain of neighbouring runs: to the first token, and for each further one."""
    vectors = base.embedding[100 : 100 + PATCH].detach().clone()
    pairs = []
    for _ in range(repeats + 1):
        plain = measured(base)
        apply(base.model, vectors)
        patched = measured(base)
        remove(base.model)
        pairs.append([b / a for a, b in zip(plain, patched, strict=True)])
    columns = dict(zip(("first_token", "per_token"), zip(*pairs[1:], strict=True), strict=True))  # the first allocates
    return {
        name: {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        for name, ratios in columns.items()
    }
