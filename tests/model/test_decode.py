"""Decoding: what transformers' own generate gives, whatever stands in the batch beside a prompt."""

import pytest
import torch
import transformers as T

from policypatch.errors import PolicyPatchError
from policypatch.model import decode
from policypatch.model.backbone import plain_logits
from policypatch.model.decode import sample
from policypatch.model.sampling import Sampling

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 20, 21, 22], [40], [5, 6, 7, 30, 31], [11, 12, 13]]
GREEDY = Sampling(temperature=0, max_new_tokens=10)
FREE = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=10)


def generate(model, prompt: list[int], patch: torch.Tensor | None, new: int) -> list[int]:
    """Greedy tokens by transformers alone, from `inputs_embeds`."""
    embeddings = model.get_input_embeddings()(torch.tensor([prompt]))
    if patch is not None:
        embeddings = torch.cat([patch[None], embeddings], 1)
    out = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0].tolist()


@pytest.mark.parametrize("patched", [False, True])
def test_greedy_is_transformers_generate(architecture, make_patch_for, patched):
    patch = make_patch_for(architecture) if patched else None
    expected = [[generate(architecture, prompt, patch, 10)] for prompt in PROMPTS]
    assert sample(architecture, PROMPTS, patch, 1, GREEDY) == expected


@torch.no_grad()
def test_cache_is_full_recomputation(tiny_llama, make_patch_for):
    patch = make_patch_for(tiny_llama)
    expected = []
    for prompt in PROMPTS:
        written: list[int] = []
        for _ in range(10):  # everything anew for each token, no cache and no padding
            written.append(plain_logits(tiny_llama, patch, [*prompt, *written], [0])[0].argmax().item())
        expected.append([written])
    assert sample(tiny_llama, PROMPTS, patch, 1, GREEDY) == expected


def test_vectors_matter_and_none_of_them_is_no_patch(tiny_llama, make_patch_for):
    bare = sample(tiny_llama, PROMPTS, None, 1, GREEDY)
    assert sample(tiny_llama, PROMPTS, torch.zeros(0, 64), 1, GREEDY) == bare
    assert sample(tiny_llama, PROMPTS, make_patch_for(tiny_llama), 1, GREEDY) != bare


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("max_rows", [1, 4, 7, 12])
def test_rows_beside_a_prompt_change_nothing(tiny_llama, make_patch_for, patched, max_rows):
    patch = make_patch_for(tiny_llama) if patched else None
    expected = sample(tiny_llama, PROMPTS, patch, 4, FREE, seed=3, eos=range(20, 60))
    assert sample(tiny_llama, PROMPTS, patch, 4, FREE, seed=3, eos=range(20, 60), max_rows=max_rows) == expected
    backwards = sample(tiny_llama, PROMPTS[::-1], patch, 4, FREE, seed=3, eos=range(20, 60), max_rows=max_rows)
    assert backwards[::-1] == expected
    assert sample(tiny_llama, PROMPTS[1:2], patch, 2, FREE, seed=3, eos=range(20, 60)) == [expected[1][:2]]


@pytest.mark.parametrize("family", [T.MistralConfig, T.Gemma3TextConfig])
def test_padding_does_not_push_the_patch_out_of_a_sliding_window(random_model, make_patch_for, family):
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = random_model(family(**sizes, num_key_value_heads=2, head_dim=8, sliding_window=12))
    patch = make_patch_for(model, 6)
    expected = [[generate(model, prompt, patch, 10)] for prompt in PROMPTS]  # 6 + 3 + 10 positions > 12
    assert sample(model, PROMPTS, patch, 1, GREEDY) == expected


def test_samples_differ_and_a_seed_repeats_them(tiny_llama):
    first = sample(tiny_llama, PROMPTS, None, 6, FREE, seed=1)
    assert all(len({tuple(c) for c in row}) == 6 for row in first)
    assert sample(tiny_llama, PROMPTS, None, 6, FREE, seed=1) == first
    assert sample(tiny_llama, PROMPTS, None, 6, FREE, seed=2) != first


def test_a_prompt_given_twice_gets_the_same_samples(tiny_llama):
    twice = sample(tiny_llama, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], None, 2, FREE)
    assert twice[0] == twice[2]


def test_global_random_state_is_neither_read_nor_moved(tiny_llama):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample(tiny_llama, PROMPTS, None, 2, FREE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert sample(tiny_llama, PROMPTS, None, 2, FREE) == first


@pytest.mark.parametrize("room", [0.0, 0.75, 1.1])  # never, as usual, after every token
@pytest.mark.parametrize("patched", [False, True])
def test_eos_cuts_and_rows_that_leave_change_nothing(tiny_llama, make_patch_for, monkeypatch, room, patched):
    patch = make_patch_for(tiny_llama) if patched else None
    sampling = Sampling(1.0, 0.9, max_new_tokens=20)
    endless = sample(tiny_llama, PROMPTS, patch, 8, sampling, seed=5)
    assert {len(c) for row in endless for c in row} == {20}
    ending = set(range(0, 300, 9))  # a ninth of the vocabulary

    def cut(tokens: list[int]) -> list[int]:
        return tokens[: next((i for i, t in enumerate(tokens) if t in ending), len(tokens))]

    expected = [[cut(c) for c in row] for row in endless]
    lengths = {len(c) for row in expected for c in row}
    assert len(lengths) > 5 and 20 in lengths
    monkeypatch.setattr(decode, "ROOM_TO_COMPACT", room)
    assert sample(tiny_llama, PROMPTS, patch, 8, sampling, seed=5, eos=sorted(ending)) == expected


def test_eos_at_once_is_an_empty_completion(tiny_llama):
    assert sample(tiny_llama, PROMPTS, None, 2, FREE, eos=range(300)) == [[[], []]] * 5


def test_min_new_tokens(tiny_llama):
    ending = list(range(0, 300, 3))
    sampling = Sampling(1.0, 0.9, max_new_tokens=12, min_new_tokens=4)
    rows = sample(tiny_llama, PROMPTS, None, 8, sampling, eos=ending)
    completions = [c for row in rows for c in row]
    assert min(map(len, completions)) == 4  # not one shorter, and with a third of the vocabulary ending, some so short
    assert not any(t in ending for c in completions for t in c)


def test_batches_are_handed_over_as_they_are_finished(tiny_llama):
    done = {}
    made = sample(
        tiny_llama, PROMPTS, None, 2, GREEDY, max_rows=4, finished=lambda i, c: done.update(zip(i, c, strict=True))
    )
    assert len(made) == 5 and [done[i] for i in range(5)] == made


def test_what_is_known_is_not_decoded_again(tiny_llama, monkeypatch: pytest.MonkeyPatch):
    """A batch of which one prompt is known is decoded as it would have been without that."""
    batches: list[list[int]] = []  # 4 rows are 2 prompts with 2 samples

    def handed(numbers, completions):
        batches.append(numbers)

    made = sample(tiny_llama, PROMPTS, None, 2, FREE, max_rows=4, finished=handed)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    nonsense = {i: [[7], [7, 7]] for i in (*batches[0], batches[1][0])}
    again = sample(tiny_llama, PROMPTS, None, 2, FREE, max_rows=4, known=nonsense)
    assert again == [nonsense[i] if i in batches[0] else made[i] for i in range(5)]


def test_nothing_to_do(tiny_llama):
    assert sample(tiny_llama, [], None) == []


def test_longer_than_the_context_is_refused(tiny_llama, make_patch_for):
    patch = make_patch_for(tiny_llama)
    fits, over = [[5] * 498], [[5], [5] * 499]  # 4 + 498 + 10 = 512
    assert len(sample(tiny_llama, fits, patch, 1, GREEDY)[0][0]) == 10
    with pytest.raises(
        PolicyPatchError, match=r"prompt 1 needs 513 positions \(4 patch \+ 499 prompt \+ 10 new\).* 512"
    ):
        sample(tiny_llama, over, patch, 1, GREEDY)


@pytest.mark.parametrize("patched", [False, True])
def test_empty_prompt_is_refused(tiny_llama, make_patch_for, patched):
    with pytest.raises(PolicyPatchError, match="prompt 1 has no tokens"):
        sample(tiny_llama, [[5], []], make_patch_for(tiny_llama) if patched else None, 1, GREEDY)
