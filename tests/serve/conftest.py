"""An engine over the tiny base with two patches, and what a request must come to."""

from collections.abc import Callable

import pytest
import torch
from tiny_run import patch_of

from policypatch.model.base import Base
from policypatch.model.decode import sample
from policypatch.serve.engine import Engine, Job


@pytest.fixture
def engine(tiny_base: Base) -> Engine:
    patches = {name: patch_of(tiny_base, name, start, 4).vectors for name, start in (("tox", 10), ("bias", 40))}
    return Engine(tiny_base, patches, rows=4, context=128, waiting=8)


@pytest.fixture
def alone(tiny_base: Base, engine: Engine) -> Callable[[Job], list[int]]:
    """alone(job) -> its tokens, by the package's own decoding, one request at a time."""

    def tokens(job: Job) -> list[int]:
        front = torch.cat([engine.patches[name] for name in job.stack]) if job.stack else None
        found = sample(tiny_base.model, [job.prompt], front, 1, job.sampling, job.seed, tiny_base.eos)
        return found[0][0]

    return tokens
