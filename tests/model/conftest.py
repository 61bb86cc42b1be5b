"""Small random models of every architecture that is meant to work."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM, PreTrainedModel

V, D = 128, 32
_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_SIZES, "num_key_value_heads": 2}
_FALCON: dict[str, Any] = {k: v for k, v in _SIZES.items() if k != "intermediate_size"}
_GPT2 = {
    "vocab_size": V,
    "n_embd": D,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {**_FALCON, "ffn_dim": 48}

# A new architecture is one row. Each is a function, so that nothing is built before it is asked for.
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaConfig(**_GQA),
    "gpt2": lambda: T.GPT2Config(**_GPT2),
    "opt": lambda: T.OPTConfig(**_OPT, word_embed_proj_dim=D),
    "opt_projected": lambda: T.OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "mistral": lambda: T.MistralConfig(**_GQA, sliding_window=64),
    "qwen2": lambda: T.Qwen2Config(**_GQA),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(
        **_GQA, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2
    ),
    "gemma": lambda: T.GemmaConfig(**_GQA, head_dim=8),
    "gemma2": lambda: T.Gemma2Config(**_GQA, head_dim=8, sliding_window=64),
    "gemma3": lambda: T.Gemma3TextConfig(**_GQA, head_dim=8, sliding_window=64),
    "gpt_neox": lambda: T.GPTNeoXConfig(**_SIZES),
    "phi": lambda: T.PhiConfig(**_SIZES),
    "phi3": lambda: T.Phi3Config(**_GQA),
    "falcon_rotary": lambda: T.FalconConfig(**_FALCON, alibi=False),
    "cohere": lambda: T.CohereConfig(**_GQA, logit_scale=0.25),
    "granite": lambda: T.GraniteConfig(**_GQA, logits_scaling=3.0, embedding_multiplier=2.0),
}


def _random_model(config: Any) -> PreTrainedModel:
    # Gemma 2 (logit soft-capping in the attention) and some old ones have eager attention alone.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        except ValueError:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # at the usual 0.02 attention is nearly uniform and would hide mistakes
    return model.eval().requires_grad_(False)


@cache
def _of_architecture(name: str) -> PreTrainedModel:
    return _random_model(ARCHITECTURES[name]())


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One model after the other of the table."""
    return _of_architecture(request.param)


@pytest.fixture
def random_model() -> Callable[[Any], PreTrainedModel]:
    """random_model(config) -> a frozen float32 model with seeded weights."""
    return _random_model


@pytest.fixture
def make_patch_for() -> Callable[..., torch.Tensor]:
    """make_patch_for(model, P) -> (P, D) seeded vectors on the scale of the embeddings."""

    def make(model: PreTrainedModel, length: int = 4, seed: int = 1) -> torch.Tensor:
        weight = model.get_input_embeddings().weight
        noise = torch.randn(length, weight.shape[1], generator=torch.Generator().manual_seed(seed))
        return noise * weight.std()

    return make
