"""What probes of a tiny base are measured with."""

from collections.abc import Callable

import pytest
import torch

from policypatch.evaluate.measure import Settings
from policypatch.evaluate.probes import Bench, Plan
from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.model.sampling import Sampling

TEXT = Sampling(max_new_tokens=6)
RESPONSE = Sampling(temperature=0.7, max_new_tokens=9)


@pytest.fixture
def bench(tiny_base: Base) -> Bench:
    """3 continuations of up to 6 tokens, 2 of them scored for perplexity; 2 responses of up to 9; no model but one."""
    plan = Plan(3, TEXT, 2, RESPONSE, seed=1, ppl_samples=2, decode_rows=16, row_tokens=64)
    return Bench(tiny_base, tiny_base, "scorer", plan, Settings(resamples=200))


@pytest.fixture
def arm(tiny_base: Base) -> Callable[..., Arm]:
    """arm(name, P) -> an arm of P random vectors, always the same for a name; without P the base alone."""

    def make(name: str = "patch", length: int | None = 3) -> Arm:
        if length is None:
            return Arm(name, None)
        generator = torch.Generator().manual_seed(sum(name.encode()))
        return Arm(name, torch.randn(length, tiny_base.width, generator=generator) * tiny_base.embedding.std())

    return make
