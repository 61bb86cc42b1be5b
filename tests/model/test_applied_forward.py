"""Forward passes of an applied patch that no `generate` prepares: padding, caches, and what fails on the way."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from policypatch.model.applied import apply, remove, using

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
