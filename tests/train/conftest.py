"""Rows to train on, a backbone with a patch, and running a stage on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from policypatch.data.datamodule import Example, PairData
from policypatch.model.backbone import PrefixBackbone, plain_logits
from policypatch.model.tree import Item
from policypatch.train.module import StageModule
from policypatch.train.stage import run_stage

PATCH = 4


def _items(count: int = 12) -> list[Item]:
    generator = torch.Generator().manual_seed(5)

    def tokens(low: int, high: int, most: int) -> tuple[int, ...]:
        length = int(torch.randint(2, most, (1,), generator=generator))
        return tuple(torch.randint(low, high, (length,), generator=generator).tolist())

    return [Item((9, *tokens(10, 290, 7)), (tokens(20, 40, 9), tokens(60, 80, 9))) for _ in range(count)]


@pytest.fixture
def rows() -> list[Example]:
    """Prompts of different lengths that begin alike; chosen and rejected draw on different tokens."""
    return [Example(item) for item in _items()]


@pytest.fixture
def mixed() -> list[Example]:
    """The same: 0 is benign and has a rejected side, 1 to 3 are benign without one, 4 to 11 are pairs."""
    items = _items()
    alone = [Example(Item(item.prompt, item.completions[:1]), "benign") for item in items[1:4]]
    return [Example(items[0], "benign"), *alone, *(Example(item) for item in items[4:])]


@pytest.fixture
def new_backbone(tiny_base) -> Callable[[], PrefixBackbone]:
    """new_backbone() -> always the same patch before the tiny base."""

    def make() -> PrefixBackbone:
        generator = torch.Generator().manual_seed(1)
        vectors = torch.randn(PATCH, tiny_base.width, generator=generator) * tiny_base.embedding.std()
        return PrefixBackbone(tiny_base.model, vectors, 64)

    return make


@pytest.fixture
def backbone(new_backbone) -> PrefixBackbone:
    return new_backbone()


@pytest.fixture
def table() -> Callable[..., torch.Tensor]:
    """table(backbone, item, side, patch) -> (tokens, V) log-probabilities of a completion by plain concatenation."""

    def make(backbone: PrefixBackbone, item: Item, side: int, patch: torch.Tensor) -> torch.Tensor:
        return plain_logits(backbone.model, patch, [*item.prompt], [*item.completions[side]]).log_softmax(-1)

    return make


@pytest.fixture
def summed(table) -> Callable[..., torch.Tensor]:
    """summed(backbone, item, side, patch) -> the completion's log-probability by plain concatenation."""

    def make(backbone: PrefixBackbone, item: Item, side: int, patch: torch.Tensor) -> torch.Tensor:
        return table(backbone, item, side, patch).gather(1, torch.tensor(item.completions[side])[:, None]).sum()

    return make


@pytest.fixture
def fit() -> Callable[..., int]:
    """fit(module, data, folder) -> the step at which the stage ended."""

    def run(
        module: StageModule, data: PairData, folder: Path, every: int = 4, clip: float = 1.0, **options: Any
    ) -> int:
        folder.mkdir(exist_ok=True)
        stage = OmegaConf.create({"steps": data.steps, "clip": clip})
        trainer = {"accelerator": "cpu", "num_nodes": 1, "checkpoint_every": every, "validate_every": 3}
        trainer |= {"recompute": False, "compile": False, "head_logits": None} | options
        return run_stage(module, data, stage, OmegaConf.create(trainer), folder, [])

    return run
