"""Rows behind one root in a single pass compute what rows with roots of their own do, and leave the model as it was."""

import copy

import pytest
import torch

from policypatch.model import over_root as module
from policypatch.model import packed
from policypatch.model.backbone import PrefixBackbone, check_tree
from policypatch.model.over_root import can_stand_over_root, over_root
from policypatch.model.tree import Item, build_tree

# Behind 5 and 6, three rows of 5, 4 and 5 tokens, the last of which has no prompt of its own.
ITEMS = [
    Item((5, 6, 13), ((14, 15), (16, 17))),
    Item((5, 6, 7), ((8,), (10, 11))),
    Item((5, 6), ((21, 22, 23, 24, 25),)),
]


@pytest.fixture
def vectors() -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(3)) * 0.08


def logprobs_and_gradient(model, vectors: torch.Tensor, recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    backbone, tree = PrefixBackbone(model, vectors), build_tree(ITEMS, 5)
    assert tree.ids.shape == (3, 5)
    backbone.recompute = recompute
    found = backbone.completion_logprobs(tree)
    return found.detach(), torch.autograd.grad(found.square().mean(), backbone.patch)[0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_computes_what_rows_with_roots_of_their_own_do(tiny_llama, vectors, monkeypatch, attention, recompute):
    before = tiny_llama.config._attn_implementation
    tiny_llama.set_attn_implementation(attention)
    try:
        assert can_stand_over_root(tiny_llama)
        found = logprobs_and_gradient(tiny_llama, vectors, recompute)
        assert tiny_llama.config._attn_implementation == attention
        monkeypatch.setattr(packed, "can_stand_over_root", lambda model: False)
        expected = logprobs_and_gradient(tiny_llama, vectors, recompute)
    finally:
        tiny_llama.set_attn_implementation(before)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_every_token_of_root_and_rows_is_read_once(tiny_llama, vectors, monkeypatch):
    tokens = []
    mlp = tiny_llama.model.layers[0].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda states: tokens.append(states.shape[:2].numel()) or forward(states))
    logprobs_and_gradient(tiny_llama, vectors, recompute=False)
    assert tokens == [4 + 2 + 3 * 5]  # patch, what the prompts share, rows


def test_the_attention_is_the_models_own_again_after_a_failure(tiny_llama):
    before = tiny_llama.config._attn_implementation
    with pytest.raises(KeyError), over_root(tiny_llama), over_root(tiny_llama):  # as a layer that runs again is
        assert can_stand_over_root(tiny_llama)
        raise KeyError
    assert tiny_llama.config._attn_implementation == before


def test_attention_that_takes_no_mask_is_not_exchanged(tiny_llama, monkeypatch):
    monkeypatch.setattr(tiny_llama.config, "_attn_implementation_internal", "flash_attention_2")
    assert not can_stand_over_root(tiny_llama)
    monkeypatch.undo()
    monkeypatch.setattr(type(tiny_llama), "_supports_attention_backend", False)
    assert not can_stand_over_root(tiny_llama)


def test_a_model_that_fails_on_it_alone_is_read_with_a_root_for_every_row(tiny_llama, monkeypatch):
    """As where a model makes a mask of its own from the one that it is given."""

    def broken(*given, **named):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(module, "attention_of", broken)
    try:
        check_tree(tiny_llama)
        assert not can_stand_over_root(tiny_llama)
    finally:
        vars(tiny_llama).pop(module.APART, None)


@pytest.mark.parametrize("rows", [1, 3])
def test_half_precision_on_a_cpu(tiny_llama, vectors, rows):
    """Attention in float32 there; held against float32 throughout, and with a gradient and without."""
    half = copy.deepcopy(tiny_llama).to(torch.bfloat16)
    tree = build_tree(ITEMS, 5 if rows == 3 else 512)
    assert len(tree.ids) == rows
    expected, found = (PrefixBackbone(model, vectors).completion_logprobs(tree) for model in (tiny_llama, half))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    with torch.no_grad():
        assert torch.equal(PrefixBackbone(half, vectors).completion_logprobs(tree), found)
