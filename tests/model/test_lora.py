"""LoRA beside the base it is injected into: what is on when, what is trained, and that the base is left whole."""

import copy

import pytest
import torch
from peft import get_peft_model

from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.lora import LoRA, LoRABackbone, LoRASettings
from policypatch.model.tree import Item

ITEMS = [Item((5, 6, 7), ((8, 9), (10, 11, 12))), Item((5, 13), ((14, 15), (16,)))]
SETTINGS = LoRASettings(2, 4.0)


@pytest.fixture
def lora(tiny_base: Base):
    """Adapters that change something; gone after the test."""
    made = LoRA(tiny_base, SETTINGS, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    yield made
    made.remove()


def plain(base: Base) -> torch.Tensor:
    backbone = PrefixBackbone(base.model, torch.zeros(0, base.width))
    return backbone.sequence_logprobs(backbone.tree(ITEMS)).detach()


def test_at_the_start_it_changes_nothing(tiny_base: Base):
    before = plain(tiny_base)
    made = LoRA(tiny_base, SETTINGS, seed=0)
    backbone = LoRABackbone(made)
    assert torch.equal(backbone.sequence_logprobs(backbone.tree(ITEMS)), before)
    made.remove()


def test_it_computes_what_peft_computes(tiny_base: Base, lora: LoRA):
    """A copy of the base under peft's own model with the same values, one sequence at a time."""
    backbone = LoRABackbone(lora)
    ours = backbone.sequence_logprobs(backbone.tree(ITEMS)).detach()
    values = {name: p.detach().clone() for name, p in lora.parameters.items()}
    lora.remove()
    theirs = get_peft_model(copy.deepcopy(tiny_base.model), lora.config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(values[name.removeprefix("base_model.model.")])
    expected = []
    for item in ITEMS:
        for completion in item.completions:
            ids = torch.tensor([[*item.prompt, *completion]])
            logprobs = theirs(ids).logits[0, len(item.prompt) - 1 : -1].log_softmax(-1)
            expected.append(logprobs.gather(1, torch.tensor(completion)[:, None]).sum())
    torch.testing.assert_close(ours, torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)


def test_the_base_under_it_is_the_base(tiny_base: Base, lora: LoRA):
    with_adapters = LoRABackbone(lora)
    tree = with_adapters.tree(ITEMS)
    off = plain(tiny_base)
    assert not torch.allclose(with_adapters.sequence_logprobs(tree), off, atol=1e-3)
    with lora.state().applied():
        assert torch.equal(plain(tiny_base), with_adapters.sequence_logprobs(tree))
    lora.remove()
    assert torch.equal(plain(tiny_base), off)


def test_merged_is_the_same_and_leaves_the_weights_bit_by_bit(tiny_base: Base, lora: LoRA):
    backbone = LoRABackbone(lora)
    unmerged = backbone.sequence_logprobs(backbone.tree(ITEMS)).detach()
    weights = {name: p.detach().clone() for name, p in tiny_base.model.named_parameters()}
    with lora.merged():
        merged = plain(tiny_base)
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, weights[name]) for name, p in tiny_base.model.named_parameters())


def test_gradients_reach_the_adapters_and_nothing_else(tiny_base: Base, lora: LoRA):
    backbone = LoRABackbone(lora)
    backbone.sequence_logprobs(backbone.tree(ITEMS)).sum().backward()
    with_gradient = {name for name, p in tiny_base.model.named_parameters() if p.grad is not None}
    assert with_gradient == set(lora.parameters)
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == {
        f"adapters.{name.replace('.', '/')}" for name in lora.parameters
    }


def test_another_look_at_the_base_takes_no_gradient_from_the_adapters(tiny_base: Base, lora: LoRA):
    """A stage's reference is computed by a backbone of its own between the stages."""
    backbone = LoRABackbone(lora)
    plain(tiny_base)
    backbone.sequence_logprobs(backbone.tree(ITEMS)).sum().backward()
    assert all(p.grad is not None for p in lora.parameters.values())


def test_the_divergence_is_from_the_base_without_adapters(tiny_base: Base, lora: LoRA):
    backbone = LoRABackbone(lora)
    tree = backbone.tree(ITEMS)
    base = PrefixBackbone(tiny_base.model, torch.zeros(0, tiny_base.width)).logits(tree).log_softmax(-1)
    ours = backbone.logits(tree).log_softmax(-1)
    by_token = (base.exp() * (base - ours)).sum(-1)
    expected = torch.stack([by_token[tree.sequence == s].mean() for s in range(tree.sequences)])
    torch.testing.assert_close(backbone.divergence(tree), expected, rtol=1e-4, atol=1e-6)


def test_within_a_block_of_work_nothing_is_switched(tiny_base: Base, lora: LoRA, monkeypatch):
    """Forwards in a row do not each walk all layers twice; the base in between does, and after it they are on again."""
    backbone = LoRABackbone(lora)
    tree = backbone.tree(ITEMS)
    expected, off = backbone.sequence_logprobs(tree).detach(), plain(tiny_base)
    switched: list[bool] = []
    switch = lora._switch
    monkeypatch.setattr(lora, "_switch", lambda on: switched.append(on) or switch(on))
    with backbone.at_work():
        for _ in range(3):
            assert torch.equal(backbone.sequence_logprobs(tree), expected)
        assert switched == [True]
        backbone.divergence(tree)
        assert switched == [True, False, True]
    assert switched == [True, False, True, False]
    assert torch.equal(plain(tiny_base), off)


def test_a_state_is_kept_while_training_goes_on(tiny_base: Base, lora: LoRA):
    state = lora.state()
    with state.applied():
        before = plain(tiny_base)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.mul_(2)
    later = lora.state()
    with state.applied():
        assert torch.equal(plain(tiny_base), before)
    with later.applied():
        assert not torch.equal(plain(tiny_base), before)


def test_each_state_has_an_identity_of_its_own(tiny_base: Base, lora: LoRA):
    first = lora.state()
    with torch.no_grad():
        next(iter(lora.parameters.values())).add_(1)
    identities = [first.base.identity, lora.state().base.identity, tiny_base.identity]
    assert len({identity.weights for identity in identities}) == 3
    assert first.base.identity == first.base.identity


def test_a_second_set_of_adapters_is_refused(tiny_base: Base, lora: LoRA):
    with pytest.raises(PolicyPatchError, match="has LoRA adapters already"):
        LoRA(tiny_base, SETTINGS, seed=0)


def test_layers_that_the_base_has_not_are_refused(tiny_base: Base):
    with pytest.raises(PolicyPatchError, match=r"lora\.targets"):
        LoRA(tiny_base, LoRASettings(2, 4.0, ("no_such_layer",)), seed=0)
