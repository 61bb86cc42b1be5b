"""The vocabulary in blocks gives what the whole of it gives, gradient included, and keeps none of it."""

import pytest
import torch
import torch.nn.functional as F

from policypatch.model import head as module
from policypatch.model.head import finish_logits, token_divergence, token_logits, token_logprobs

N = 7


def drawn(model, seed: int) -> torch.Tensor:
    width = model.get_output_embeddings().weight.shape[1]
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def whole(model, states: torch.Tensor) -> torch.Tensor:
    """(N, V) log-probabilities the obvious way, in float64."""
    head = model.get_output_embeddings()
    bias = None if getattr(head, "bias", None) is None else head.bias.double()
    return finish_logits(model, F.linear(states.double(), head.weight.double(), bias)).log_softmax(-1)


@pytest.mark.parametrize("block", [N * 10, None])
def test_as_the_whole_vocabulary(architecture, block, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 10)
    states, base, outer = drawn(architecture, 0), drawn(architecture, 1), torch.linspace(-1, 2, N)
    targets = torch.tensor([0, 9, 10, 127, 64, 9, 3])
    plain = whole(architecture, states).gather(1, targets[:, None])[:, 0]
    ours = token_logprobs(architecture, states, targets, block)
    torch.testing.assert_close(ours, plain.float(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((plain * outer).sum(), states)[0]
    torch.testing.assert_close(torch.autograd.grad((ours * outer).sum(), states)[0], expected, rtol=1e-4, atol=1e-5)

    first, second = whole(architecture, base), whole(architecture, states)
    plain = (first.exp() * (first - second)).sum(1)
    ours = token_divergence(architecture, states, base.detach(), block)
    torch.testing.assert_close(ours, plain.float(), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad((plain * outer).sum(), states)[0]
    torch.testing.assert_close(torch.autograd.grad((ours * outer).sum(), states)[0], expected, rtol=1e-4, atol=1e-5)


def test_logits_of_any_size(tiny_llama):
    states = (drawn(tiny_llama, 0) * 1e4).detach().requires_grad_()
    found = token_logprobs(tiny_llama, states, torch.arange(N))
    found.sum().backward()
    assert found.isfinite().all() and states.grad.isfinite().all()
    assert (found <= 0).all()


def test_backward_keeps_no_logits(tiny_llama):
    states, kept = drawn(tiny_llama, 0), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = token_logprobs(tiny_llama, states, torch.arange(N)).sum()
        loss = loss + token_divergence(tiny_llama, states, drawn(tiny_llama, 1).detach()).sum()
    assert sum(kept) == 2 * states.numel()
    loss.backward()


@torch.no_grad()
def test_nothing_is_summed_for_a_gradient_that_nobody_wants(tiny_llama, monkeypatch):
    def forbidden(*args):
        raise AssertionError("a gradient was prepared")

    monkeypatch.setattr(module._Softmax, "mean", forbidden)
    states = drawn(tiny_llama, 0).detach()
    assert token_logprobs(tiny_llama, states, torch.arange(N)).shape == (N,)
    assert token_divergence(tiny_llama, states, states).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_has_its_logit_whatever_the_head_rounds_to(architecture, dtype):
    """Of states and weights as they are in that type; what the head itself gives is far off in bfloat16."""
    head = architecture.get_output_embeddings()
    kept = [parameter.data for parameter in head.parameters()]
    try:
        for parameter in head.parameters():
            parameter.data = parameter.data.to(dtype)
        states, tokens = (9 * drawn(architecture, 0).detach()).to(dtype), torch.arange(N)
        products = (states.double() * head.weight[tokens].double()).sum(1)
        if getattr(head, "bias", None) is not None:
            products = products + head.bias[tokens].double()
        found = token_logits(architecture, states, tokens)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, finish_logits(architecture, products).float(), rtol=1e-5, atol=1e-5)
        twice = token_logprobs(architecture, states[:1].expand(2, -1), tokens[:2])  # what one state gives two tokens
        both = token_logits(architecture, states[:1].expand(2, -1), tokens[:2])
        torch.testing.assert_close(twice[0] - twice[1], both[0] - both[1], rtol=1e-4, atol=1e-4)
    finally:
        for parameter, before in zip(head.parameters(), kept, strict=True):
            parameter.data = before


def test_half_precision_is_near(tiny_llama):
    states = drawn(tiny_llama, 0)
    exact = token_logprobs(tiny_llama, states, torch.arange(N)).detach()
    head = tiny_llama.get_output_embeddings()
    before = head.weight.data
    try:
        head.weight.data = before.bfloat16()
        half = states.detach().bfloat16().requires_grad_()
        found = token_logprobs(tiny_llama, half, torch.arange(N))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.detach(), exact, rtol=0.05, atol=0.05)
        found.sum().backward()
        assert half.grad.dtype == torch.bfloat16
    finally:
        head.weight.data = before
