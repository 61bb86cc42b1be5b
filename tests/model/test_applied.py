"""An applied patch is vectors before the input: whatever generates, however it is batched, padded and cached."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel, StaticCache, TextStreamer
from transformers.generation.streamers import BaseStreamer

from policypatch.errors import PolicyPatchError
from policypatch.model.applied import KNOWN, PREFIX, STATE, apply, remove, state_of, using

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [40, 41]]
NEW = 8
OPTIONS = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


def vectors_for(model: PreTrainedModel, length: int, seed: int = 0) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    drawn = torch.randn(length, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    return (drawn * weight.std()).detach()


def padded(prompts: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    rows = [([0] * (width - len(p)), p) for p in prompts]
    ids = [pad + p if side == "left" else p + pad for pad, p in rows]
    mask = [[0] * len(pad) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * len(pad) for pad, p in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def by_hand(model: PreTrainedModel, prompt: list[int], vectors: torch.Tensor | None, **options) -> list[int]:
    """What transformers writes behind vectors that are handed to it as embeddings."""
    embedded = model.get_input_embeddings()(torch.tensor(prompt))
    embedded = embedded if vectors is None else torch.cat([vectors, embedded])
    mask = torch.ones(1, len(embedded), dtype=torch.long)
    out = model.generate(
        inputs_embeds=embedded[None], attention_mask=mask, **(OPTIONS | {"do_sample": False} | options)
    )
    return out[0].tolist()


@pytest.fixture
def model(tiny_llama):
    yield tiny_llama
    remove(tiny_llama)


def test_greedy_text_is_that_of_vectors_before_the_prompt(architecture):
    """Left padding, three prompts of different lengths in a batch."""
    vectors = vectors_for(architecture, 3)
    expected = [by_hand(architecture, prompt, vectors) for prompt in PROMPTS]
    batch = padded(PROMPTS, "left")
    if type(architecture).__name__.startswith("Falcon"):  # it has an attention of its own
        with pytest.raises(PolicyPatchError, match="FalconForCausalLM is not supported"):
            apply(architecture, vectors)
        assert state_of(architecture) is None
        return
    apply(architecture, vectors)
    out = architecture.generate(**batch, **OPTIONS, do_sample=False)
    remove(architecture)  # other tests have the same one
    assert out[:, batch["input_ids"].shape[1] :].tolist() == expected


def test_removing_restores_every_bit(model):
    ids = torch.tensor([PROMPTS[1]])
    before, weights = model(ids).logits, {name: p.clone() for name, p in model.state_dict().items()}
    apply(model, vectors_for(model, 4))
    assert not torch.equal(model(ids).logits, before)
    remove(model)
    assert torch.equal(model(ids).logits, before)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    assert not any(STATE in module.__dict__ for module in model.modules())
    assert remove(model) is model  # and once more is nothing


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_logits_are_those_of_plain_concatenation_also_with_right_padding(model, kind):
    model.config._attn_implementation = kind
    vectors = vectors_for(model, 4)
    batch = padded(PROMPTS, "right")
    expected = []
    for prompt in PROMPTS:
        embedded = torch.cat([vectors, model.get_input_embeddings()(torch.tensor(prompt))])[None]
        expected.append(model(inputs_embeds=embedded).logits[0, 4:])
    apply(model, vectors)
    assert model.config._attn_implementation == PREFIX + kind
    logits = model(**batch).logits
    for row, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[: len(theirs)], theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams(model, options):
    vectors = vectors_for(model, 4)
    embedded = torch.cat([vectors, model.get_input_embeddings()(torch.tensor(PROMPTS[0]))])[None]
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    expected = model.generate(inputs_embeds=embedded, attention_mask=mask, **OPTIONS, **options)
    apply(model, vectors)
    ids = torch.tensor([PROMPTS[0]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, **options)
    assert out[:, 3:].tolist() == expected.tolist()


def test_samples_are_drawn_from_the_same_distribution(model):
    vectors = vectors_for(model, 4)
    torch.manual_seed(3)
    expected = by_hand(model, PROMPTS[0], vectors, do_sample=True, top_k=0)
    apply(model, vectors)
    ids = torch.tensor([PROMPTS[0]])
    torch.manual_seed(3)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, do_sample=True, top_k=0)
    assert out[0, 3:].tolist() == expected


def test_a_static_cache(model):
    vectors = vectors_for(model, 4)
    expected = [by_hand(model, prompt, vectors) for prompt in PROMPTS]
    apply(model, vectors)
    out = model.generate(**padded(PROMPTS, "left"), **OPTIONS, do_sample=False, cache_implementation="static")
    assert out[:, 5:].tolist() == expected
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = torch.tensor([PROMPTS[1]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **OPTIONS, do_sample=False)
    assert out[0, 5:].tolist() == expected[1]


def test_a_cache_goes_on_over_the_turns_of_a_chat(model):
    """The second turn with the first one's cache is the conversation at once; the cache holds real tokens only."""
    vectors = vectors_for(model, 4)
    apply(model, vectors)
    cache = DynamicCache()
    first = torch.tensor([PROMPTS[0]])
    said = model.generate(
        first, past_key_values=cache, attention_mask=torch.ones_like(first), **OPTIONS, do_sample=False
    )
    assert cache.get_seq_length() == said.shape[1] - 1
    second = torch.cat([said, torch.tensor([[11, 12, 13]])], 1)
    mask = torch.ones_like(second)
    out = model.generate(second, past_key_values=cache, attention_mask=mask, **OPTIONS, do_sample=False)
    whole = by_hand(remove(model), second[0].tolist(), vectors)
    assert out[0, second.shape[1] :].tolist() == whole


def test_a_cache_does_not_go_on_behind_another_stack(model):
    a, b, ids = vectors_for(model, 3, 1), vectors_for(model, 5, 2), torch.tensor([PROMPTS[0]])
    own, before = model(ids).past_key_values, model(ids).past_key_values  # of the plain base
    apply(model, a)
    static = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        caches = [DynamicCache(), static, model(ids).past_key_values]  # the last one is made by the model
        for kept in caches[:2]:
            model(ids, past_key_values=kept)
        for kept in caches:
            for other in ([b], None):
                with using(model, other), pytest.raises(PolicyPatchError, match="filled behind another stack"):
                    model(torch.tensor([[8]]), past_key_values=kept)
            model(torch.tensor([[8]]), past_key_values=kept)
            assert int(kept.get_seq_length()) == 4
        with pytest.raises(PolicyPatchError, match="or none"):
            model(torch.tensor([[8]]), past_key_values=own)
        with using(model, None):
            model(torch.tensor([[8]]), past_key_values=before)
        static.reset()
        with using(model, [b]):
            again = model(ids, past_key_values=static).logits
            assert torch.allclose(again, model(ids).logits, atol=1e-5)


def test_a_cache_that_was_emptied_serves_what_is_applied_next(model):
    """Of another stack of the same length, and of none."""
    a, b, ids = vectors_for(model, 3, 1), vectors_for(model, 3, 2), torch.tensor([PROMPTS[0]])
    cache = DynamicCache()
    with torch.no_grad():
        plain = model(ids).logits
        apply(model, a)
        model(ids, past_key_values=cache)
        cache.reset()
        remove(model)
        assert torch.equal(model(ids, past_key_values=cache).logits, plain)
        cache.reset()
        apply(model, b)
        expected = model(ids).logits
        model(ids[:, :2], past_key_values=cache)
        assert torch.allclose(model(ids[:, 2:], past_key_values=cache).logits, expected[:, 2:], atol=1e-5)


def test_another_attention_implementation_is_not_taken_for_a_patched_one(model):
    vectors, ids = vectors_for(model, 3), torch.tensor([PROMPTS[0]])
    apply(model, vectors)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("eager")
        with pytest.raises(PolicyPatchError, match="apply it again"):
            model(ids)
        apply(model, vectors)
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert remove(model).config._attn_implementation == "eager"


def test_a_stack_is_computed_without_dropout():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64, attn_pdrop=0.5, embd_pdrop=0.5)
    model = GPT2LMHeadModel(config).eval()
    vectors, ids = vectors_for(model, 3), torch.tensor([PROMPTS[0]])
    expected = apply(model, vectors)(ids).logits
    remove(model)
    apply(model.eval(), vectors_for(model, 2))
    model.train()
    with using(model, [vectors]):
        assert model.training and model.transformer.drop.training
        assert torch.allclose(model.eval()(ids).logits, expected, atol=1e-5)


def test_a_streamer_gets_the_tokens_one_by_one(model):
    class Kept(BaseStreamer):
        def __init__(self):
            self.tokens: list[int] = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    assert issubclass(TextStreamer, BaseStreamer)
    vectors = vectors_for(model, 4)
    expected = by_hand(model, PROMPTS[0], vectors)
    apply(model, vectors)
    ids, kept = torch.tensor([PROMPTS[0]]), Kept()
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=kept, **OPTIONS, do_sample=False)
    assert kept.tokens == PROMPTS[0] + expected


def test_a_stack_is_its_parts_in_order(model):
    a, b = vectors_for(model, 3, 1), vectors_for(model, 2, 2)
    expected = by_hand(model, PROMPTS[0], torch.cat([a, b]))
    apply(model, a, b)
    ids = torch.tensor([PROMPTS[0]])
    assert (
        model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, do_sample=False)[0, 3:].tolist() == expected
    )
    apply(model, a)  # and another one in its place
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, do_sample=False)
    assert out[0, 3:].tolist() == by_hand(remove(model), PROMPTS[0], a)


def test_each_row_may_have_a_stack_of_its_own(model):
    a, b = vectors_for(model, 3, 1), vectors_for(model, 5, 2)
    rows = [[a], None, [a, b]]
    hands = [a, None, torch.cat([a, b])]
    expected = [by_hand(model, prompt, v) for prompt, v in zip(PROMPTS, hands, strict=True)]
    plain = by_hand(model, PROMPTS[0], None)
    apply(model, a)
    with using(model, *rows):
        out = model.generate(**padded(PROMPTS, "left"), **OPTIONS, do_sample=False)
        beams = model.generate(**padded(PROMPTS, "left"), **OPTIONS, num_beams=2)
    assert out[:, 5:].tolist() == expected
    with using(model, None):
        ids = torch.tensor([PROMPTS[0]])
        assert (
            model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, do_sample=False)[0, 3:].tolist()
            == plain
        )
    with using(model, [a]):
        single = model.generate(torch.tensor([PROMPTS[0]]), attention_mask=torch.ones(1, 3), **OPTIONS, num_beams=2)
    assert beams[0, 5:].tolist() == single[0, 3:].tolist()
    with using(model, [a], None), pytest.raises(PolicyPatchError, match="2 stacks do not fit a batch of 3"):
        model(**padded(PROMPTS, "left"))


def test_the_stack_is_computed_once(model):
    vectors, read = vectors_for(model, 4), []
    apply(model, vectors)
    handle = model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    with using(model, None):
        pass
    apply(model, vectors)
    ids = torch.tensor([PROMPTS[0]])
    model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, do_sample=False)
    handle.remove()
    assert read == [3, *[1] * (NEW - 1)]


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"], indirect=True)
def test_a_sliding_window_moves_past_the_patch(architecture):
    """A window of 64: behind 58 tokens the first vectors are out of sight of the sliding layers, as by hand."""
    vectors = vectors_for(architecture, 6)
    prompts = [[(7 * i) % 100 + 5 for i in range(62)], [(3 * i) % 100 + 5 for i in range(62)]]
    expected = [by_hand(architecture, prompt, vectors) for prompt in prompts]
    apply(architecture, vectors)
    out = architecture.generate(**padded(prompts, "left"), **OPTIONS, do_sample=False)
    remove(architecture)
    assert out[:, 62:].tolist() == expected


def test_what_cannot_be_applied_is_refused_and_leaves_the_model_alone(model):
    before = model(torch.tensor([PROMPTS[0]])).logits
    for vectors, message in (([torch.zeros(2, 7)], "takes vectors of width 64"), ([], "at least one patch")):
        with pytest.raises(PolicyPatchError, match=message):
            apply(model, *vectors)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(PolicyPatchError, match="sdpa or eager, not flex_attention"):
        apply(model, vectors_for(model, 2))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(PolicyPatchError, match="call apply first"), using(model, None):
        pass
    assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits, before)


def test_a_model_that_is_moved_takes_its_stack_along(model):
    """To another type here; another device is the same to it."""
    vectors = vectors_for(model, 3)
    batch = padded(PROMPTS, "left")
    apply(model, vectors)
    expected = model(**batch).logits
    half = model.to(torch.bfloat16)(**batch).logits
    assert half.dtype == torch.bfloat16
    remove(model)
    apply(model, vectors)  # anew, in that type
    assert torch.equal(model(**batch).logits, half)
    model.to(torch.float32)
    close = model(**batch).logits - expected  # the weights were rounded on the way
    assert close.abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_turn_beyond_the_context_is_refused_and_an_answer_beyond_it_is_told(model, kind):
    context = model.config.max_position_embeddings
    apply(model, vectors_for(model, 3))
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=context)
    model(input_ids=torch.ones(1, context - 5, dtype=torch.long), past_key_values=cache)
    with pytest.raises(PolicyPatchError, match=f"3 vectors and {context - 5} tokens and 3 more exceed"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=torch.ones(1, 2, dtype=torch.long), past_key_values=cache)
    with pytest.warns(UserWarning, match="beyond the model's context"):
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)


def test_stacks_that_were_left_are_not_kept_for_ever(model):
    first, ids = vectors_for(model, 2), torch.tensor([PROMPTS[0]])
    apply(model, first)
    expected = model(ids).logits
    with torch.no_grad():
        for seed in range(1, KNOWN + 8):
            with using(model, [vectors_for(model, 1, seed)]):
                pass
    assert len(state_of(model).known) == KNOWN
    assert torch.equal(model(ids).logits, expected)
