"""Forward passes of an applied patch that no `generate` prepares: padding, caches, and what fails on the way."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel, StaticCache

from policypatch.errors import PolicyPatchError
from policypatch.model.applied import STATE, apply, remove, state_of, using

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [40, 41]]
MORE = [[11, 12], [13, 14], [15, 16]]


@pytest.fixture
def model(tiny_llama):
    yield tiny_llama
    remove(tiny_llama)


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (3, 5)."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])


def alone(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of each prompt and what comes after it, in a batch of its own."""
    return [model(torch.tensor([[*prompt, *more]])).logits[0] for prompt, more in zip(PROMPTS, MORE, strict=True)]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.std()), rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_left_padding_does_not_stand_between_the_patch_and_a_prompt(architecture, make_patch_for, cached: bool):
    if type(architecture).__name__.startswith("Falcon"):
        pytest.skip("has an attention of its own")
    (ids, mask), more = left_padded(), torch.tensor(MORE)
    apply(architecture, make_patch_for(architecture, 3))
    try:
        expected, ones = alone(architecture), torch.ones_like(more)
        if cached:
            cache = DynamicCache()
            first = architecture(ids, attention_mask=mask, past_key_values=cache).logits
            whole = torch.cat([mask, ones], 1)
            second = architecture(more, attention_mask=whole, past_key_values=cache).logits
            logits = torch.cat([first, second], 1)
        else:
            logits = architecture(torch.cat([ids, more], 1), attention_mask=torch.cat([mask, ones], 1)).logits
    finally:
        remove(architecture)  # other tests have the same one
    for row, theirs in zip(logits, expected, strict=True):
        assert_close(row[-len(theirs) :], theirs)


def test_left_padding_with_a_static_cache_and_with_stacks_of_their_own(model, make_patch_for):
    (ids, mask), more = left_padded(), torch.tensor(MORE)
    stacks = [[make_patch_for(model, 3)], None, [make_patch_for(model, 5, 2)]]
    apply(model, make_patch_for(model, 3))
    expected = []
    for row, stack in enumerate(stacks):
        with using(model, stack):
            expected.append(alone(model)[row])
    static = StaticCache(config=model.config, max_cache_len=16)
    with using(model, *stacks), torch.no_grad():
        for kept in (DynamicCache(), static):
            first = model(ids, attention_mask=mask, past_key_values=kept).logits
            whole = torch.cat([mask, torch.ones_like(more)], 1)
            second = model(more, attention_mask=whole, past_key_values=kept).logits
            for row, theirs in zip(torch.cat([first, second], 1), expected, strict=True):
                assert_close(row[-len(theirs) :], theirs)


def test_a_mask_of_four_dimensions_says_nothing_of_padding(model, make_patch_for):
    ids = torch.tensor([PROMPTS[1]])
    apply(model, make_patch_for(model, 3))
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    assert_close(model(ids, attention_mask=causal).logits, model(ids).logits)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt(), RuntimeError("a kernel")])
@pytest.mark.parametrize("part", ["_computed", "_check", "_stamp", "decoder_of"])
def test_whatever_ends_the_first_call_leaves_nothing_behind(model, make_patch_for, monkeypatch, part: str, error):
    def fails(*_):
        raise error

    vectors, ids = make_patch_for(model, 3), torch.tensor([PROMPTS[0]])
    before = model(ids).logits
    with monkeypatch.context() as patched:
        patched.setattr(f"policypatch.model.applied.{part}", fails)
        with pytest.raises((type(error), PolicyPatchError)):
            apply(model, vectors)
    assert state_of(model) is None and model.config._attn_implementation == "sdpa"
    assert not any(STATE in module.__dict__ for module in model.modules())
    assert torch.equal(model(ids).logits, before)
    checked = []
    monkeypatch.setattr("policypatch.model.applied._check", lambda *given: checked.append(given))
    apply(model, vectors)
    assert len(checked) == 1


def test_too_little_memory_is_not_taken_for_an_architecture_that_does_not_fit(model, make_patch_for, monkeypatch):
    read = []

    def fails(*given):
        read.append(given)
        if len(read) > 1:  # the stack was computed, and is compared with plain concatenation
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("policypatch.model.applied._stamp", fails)
    with pytest.raises(torch.OutOfMemoryError):
        apply(model, make_patch_for(model, 3))


def test_a_model_in_training_is_checked_without_dropout(make_patch_for):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64, embd_pdrop=0.5, resid_pdrop=0.5)
    model = GPT2LMHeadModel(config).train()
    model.transformer.h[0].eval()  # as a customer has set it
    modes = [module.training for module in model.modules()]
    apply(model, make_patch_for(model, 3))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("learning", [False, True])
def test_a_cache_that_was_filled_behind_a_stack_does_not_go_on_without(model, make_patch_for, learning: bool):
    ids = torch.tensor([PROMPTS[0]])
    plain = model(ids).logits
    apply(model, make_patch_for(model, 3))
    given = DynamicCache()
    with torch.set_grad_enabled(learning):
        model(ids, past_key_values=given)
        made = model(ids).past_key_values  # by the model itself
    remove(model)
    for cache in (given, made):
        with pytest.raises(PolicyPatchError, match="start a new cache"):
            model(ids, past_key_values=cache)
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, plain)
