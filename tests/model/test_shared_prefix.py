"""Every architecture: the shared-prefix forward, plain concatenation and PEFT's prompt tuning are the same function.

float32. Loss to 1e-6 relative, gradient of the patch to 1e-5 relative (norm of the difference over the norm).
"""

import pytest
import torch
import transformers as T
from peft import PromptTuningConfig, TaskType, get_peft_model

from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone, check_tree, difference, plain_logits
from policypatch.model.tree import Item, build_tree

CASES = {
    "ragged behind a common prefix": [
        Item((5, 6, 7, 20, 21, 3), ((8, 9, 4), (10, 11, 12, 30, 31))),
        Item((5, 6, 13), ((14, 15), (16,))),
        Item((5, 6, 13, 40, 41, 42, 43, 44, 45, 46), ((17, 18, 19, 20), (21,))),
    ],
    "nothing in common, one and two completions": [
        Item((50, 51), ((8, 9, 4),)),
        Item((5, 6, 13), ((14, 15), (16, 17, 18, 19))),
        Item((61, 62, 63, 64, 65), ((17,),)),
    ],
    "identical prompts": [
        Item((5, 6, 7), ((8, 9), (10, 11, 12))),
        Item((5, 6, 7), ((13,), (14, 15))),
        Item((5, 6, 7), ((8, 9), (16, 17, 18))),
    ],
    "one pair, and a prompt that is the other's beginning": [
        Item((5, 6), ((8, 9), (10,))),
        Item((5, 6, 7), ((11, 12, 13, 14), (15, 16))),
    ],
    "one item": [Item((5, 6, 7), ((8, 9), (10, 11, 12)))],
}


def sft_like(logprobs: list[torch.Tensor]) -> torch.Tensor:
    """Mean over completions of the mean negative log-likelihood per token."""
    return -torch.stack([row.mean() for row in logprobs]).mean()


def by_completion(values: torch.Tensor, tree) -> list[torch.Tensor]:
    return [values[tree.sequence == s] for s in range(tree.sequences)]


def plain_logprobs(model, patch, items) -> list[torch.Tensor]:
    rows = []
    for item in items:
        for completion in item.completions:
            logprobs = plain_logits(model, patch, [*item.prompt], [*completion]).log_softmax(-1)
            rows.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return rows


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_tree_equals_plain_concatenation(architecture, make_patch_for, case):
    items = CASES[case]
    vectors = make_patch_for(architecture).requires_grad_()
    expected = sft_like(plain_logprobs(architecture, vectors, items))
    (expected_gradient,) = torch.autograd.grad(expected, vectors)
    assert expected_gradient.norm() > 0
    rows = []
    for row_tokens in (512, 12):
        backbone, tree = PrefixBackbone(architecture, vectors), build_tree(items, row_tokens)
        rows.append(tree.ids.shape[0])
        loss = sft_like(by_completion(backbone.completion_logprobs(tree), tree))
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert relative(backbone.patch.grad, expected_gradient) < 1e-5
    assert rows[0] == 1
    assert rows[1] > 1 or len(items) == 1 or case == "one pair, and a prompt that is the other's beginning"


def test_peft_prompt_tuning_is_the_same_function(architecture, make_patch_for, monkeypatch):
    vectors = make_patch_for(architecture)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=len(vectors),
        token_dim=vectors.shape[1],
        num_layers=3,
        num_attention_heads=4,
        num_transformer_submodules=1,
    )
    prompt, completion = (5, 6, 7, 20, 21, 3), (8, 9, 4, 30)
    ids = torch.tensor([[*prompt, *completion]])
    theirs = get_peft_model(architecture, config)
    theirs.eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(vectors)
    output = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    at = len(vectors) + len(prompt)
    expected = output[at - 1 : at - 1 + len(completion)].float()
    backbone = PrefixBackbone(architecture, vectors)
    tree = backbone.tree([Item(prompt, (completion,))])
    logits = backbone.logits(tree)
    assert relative(logits.detach(), expected.detach()) < 1e-5

    target = torch.tensor(completion)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(expected, target), weight)
    torch.nn.functional.cross_entropy(logits, target).backward()
    assert relative(backbone.patch.grad, gradient) < 1e-5


def test_loading_accepts_it(architecture, monkeypatch):
    graphs = []
    logits = PrefixBackbone.logits
    monkeypatch.setattr(
        PrefixBackbone, "logits", lambda self, tree: graphs.append(torch.is_grad_enabled()) or logits(self, tree)
    )
    check_tree(architecture)
    assert graphs == [False, False]  # ranks that share a base out would wait for a backward pass


_COMMON = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4}
UNSUPPORTED = {
    "FalconForCausalLM": lambda: T.FalconConfig(**_COMMON, num_hidden_layers=2, alibi=True),
    "BloomForCausalLM": lambda: T.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4),
    "MptForCausalLM": lambda: T.MptConfig(vocab_size=128, d_model=32, n_layers=2, n_heads=4),
    "MambaForCausalLM": lambda: T.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4),
    "RecurrentGemmaForCausalLM": lambda: T.RecurrentGemmaConfig(
        **_COMMON, num_hidden_layers=3, intermediate_size=48, lru_width=32, attention_window_size=16
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_architecture_is_named(random_model, name):
    with pytest.raises(PolicyPatchError, match=f"{name} is not supported"):
        check_tree(random_model(UNSUPPORTED[name]()))


def test_half_precision_is_no_excuse_for_an_architecture(random_model):
    """Positions that are ignored move all logits, rounding moves few of them far."""
    with pytest.raises(PolicyPatchError, match="MptForCausalLM is not supported"):
        check_tree(random_model(UNSUPPORTED["MptForCausalLM"]()).to(torch.bfloat16))
    theirs = torch.tensor([[1.0, -1.0] * 50])
    ours = theirs.clone()
    ours[0, 0] += 0.4
    spread = theirs.std().item()
    assert difference(ours, theirs, torch.float32) == pytest.approx(0.4 / spread)
    assert difference(ours, theirs, torch.bfloat16) == pytest.approx(0.04 / spread)


@pytest.fixture
def windowed(random_model):
    """A Mistral whose layers look back 10 positions."""
    return random_model(
        T.MistralConfig(**_COMMON, num_hidden_layers=2, intermediate_size=48, num_key_value_heads=2, sliding_window=10)
    )


def test_window_as_long_as_the_sequence_is_exact(windowed, make_patch_for):
    patch = make_patch_for(windowed)
    backbone = PrefixBackbone(windowed, patch)
    tree = backbone.tree([Item((5, 6, 7), ((8, 9, 10), (11,)))])  # 4 + 3 + 3 = 10 positions
    expected = torch.cat(plain_logprobs(windowed, patch, [Item((5, 6, 7), ((8, 9, 10), (11,)))]))
    torch.testing.assert_close(backbone.completion_logprobs(tree).detach(), expected, rtol=1e-5, atol=1e-5)


def test_window_shorter_than_the_sequence_is_refused(windowed, make_patch_for):
    backbone = PrefixBackbone(windowed, make_patch_for(windowed))
    with pytest.raises(PolicyPatchError, match=r"11 tokens .* sliding window of 10 of this MistralForCausalLM"):
        backbone.completion_logprobs(backbone.tree([Item((5, 6, 7, 8), ((8, 9, 10), (11,)))]))


def test_window_of_zero_means_none(random_model):
    # Qwen2-MoE writes sliding_window=0 where its layers have none.
    config = T.Qwen2MoeConfig(**_COMMON, num_key_value_heads=2, num_hidden_layers=2, num_experts=4)
    assert config.sliding_window == 0
    check_tree(random_model(config))


def test_longer_than_the_context_is_refused(tiny_llama):
    backbone = PrefixBackbone(tiny_llama, torch.zeros(4, 64))
    fits, over = [Item((5,), ((6,) * 507,))], [Item((5,), ((6,) * 508,))]  # 4 + 1 + 507 = 512
    with torch.no_grad():
        backbone.completion_logprobs(build_tree(fits, 1024))
        with pytest.raises(PolicyPatchError, match=r"513 tokens .* context of 512"):
            backbone.completion_logprobs(build_tree(over, 1024))
