"""The bases that are timed."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.shapes import Shape
from policypatch.model.backbone import check_tree
from policypatch.model.base import Base, identify
from policypatch.model.load import choose_device, choose_dtype, load_base

CONF = Path(__file__).parent.parent / "conf" / "model"
CONTEXT, BOS, EOS = 4096, 1, 2


def default_base(dtype: str) -> Base:
    """The default base in this precision, a copy of its own."""
    return load_base(OmegaConf.merge(OmegaConf.load(CONF / "smollm2_135m.yaml"), {"dtype": dtype}))


def shaped_base(shape: Shape, dtype: str, layers: int | None = None) -> Base:
    """A base of this shape with random weights, which take the time of any others, on a GPU where there is one.

    Args:
        shape: of a Llama-like base.
        dtype: as in conf/model/.
        layers: of them; all where this is None.
    """
    shape = replace(shape, layers=layers or shape.layers)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // shape.head,
        num_key_value_heads=shape.keys // shape.head,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=shape.tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    device = choose_device("auto")
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=choose_dtype(dtype, device), attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    words = {f"w{i}": i for i in range(shape.vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        unk_token="w0",
        bos_token=f"w{BOS}",
        eos_token=f"w{EOS}",
        pad_token=f"w{EOS}",
    )
    check_tree(model)
    return Base(model, tokenizer, identify(model, tokenizer, f"{shape.name}-random", "random"))


def release() -> None:
    """Let go of bases that are no longer used, which trainers refer to in circles."""
    gc.collect()
    torch.cuda.empty_cache()
