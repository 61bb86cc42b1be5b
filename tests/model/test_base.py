"""Loading a base: what it is recognised by, and what is refused before anything is computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as T
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from policypatch.errors import PolicyPatchError
from policypatch.files import cache
from policypatch.model.base import Base, identify
from policypatch.model.load import choose_device, choose_dtype, load_base


def config(folder: Any, **changes: Any) -> DictConfig:
    plain = {"name": "tiny", "source": None, "path": str(folder), "revision": None}
    plain |= {"dtype": "float32", "device": "cpu", "attention": "sdpa", "quantize": None}
    return OmegaConf.create(plain | changes)


@pytest.fixture
def copy(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base's folder that may be changed."""
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folder(tiny_base: Base, tiny_llama):
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(tiny_base.model(ids).logits, tiny_llama(ids).logits)
    assert not tiny_base.model.training
    assert not any(p.requires_grad for p in tiny_base.model.parameters())
    assert (tiny_base.width, tiny_base.context) == (64, 512)
    assert tiny_base.embedding.shape == (300, 64)
    assert tiny_base.eos == (1,)
    assert tiny_base.identity.id == "tiny"
    assert tiny_base.identity.revision == "local"


def test_text_there_and_back(tiny_base: Base):
    text = "  Nobody said  that, did they ? \n Ünïcode 猫"
    tokens = tiny_base.encode(text)
    assert tiny_base.decode(tokens) == text
    assert not {0, 1, 2} & set(tokens)
    assert tiny_base.decode([0, *tokens, 1]) == text  # special tokens are no text


def test_every_eos_of_the_generation_config_ends(copy: Path):
    edit_json(copy / "generation_config.json", eos_token_id=[7, 1, 9])
    assert load_base(config(copy)).eos == (7, 1, 9)


def test_digests_do_not_depend_on_how_it_is_loaded(tiny_base: Base, tiny_base_folder: Path, tmp_path: Path):
    rounded = load_base(config(tiny_base_folder, dtype="bfloat16"))
    assert rounded.model.dtype == torch.bfloat16
    assert rounded.identity == tiny_base.identity
    assert load_base(config(tiny_base_folder, attention="eager")).identity == tiny_base.identity
    # The same model stored in half the bytes, under another name.
    rounded.model.save_pretrained(tmp_path / "half")
    rounded.tokenizer.save_pretrained(tmp_path / "half")
    half = load_base(config(tmp_path / "half", name="other"))
    assert half.model.dtype == torch.float32
    assert half.identity.id == "other"
    assert tiny_base.identity.differences(half.identity) == []


def test_digests_do_not_move_between_calls(tiny_base: Base):
    assert identify(tiny_base.model, tiny_base.tokenizer, "tiny", "local") == tiny_base.identity


def test_what_a_customer_pads_with_or_wants_returned_is_no_other_base(tiny_llama, tiny_tokenizer):
    before = identify(tiny_llama, tiny_tokenizer, "tiny", "local")
    tiny_llama.config.pad_token_id, tiny_llama.config.output_hidden_states = 1, True
    assert identify(tiny_llama, tiny_tokenizer, "tiny", "local") == before
    assert before.context == 512


def test_a_tokenizer_that_has_padded_and_cut_is_the_same(tiny_base: Base, tiny_base_folder: Path):
    tokenizer = T.AutoTokenizer.from_pretrained(tiny_base_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer(["one", "one and two"], padding=True, truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.padding is not None and tokenizer.backend_tokenizer.truncation is not None
    assert identify(tiny_base.model, tokenizer, "tiny", "local") == tiny_base.identity
    assert tokenizer.backend_tokenizer.padding is not None


def change_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][4, 4] += 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def change_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def change_config(folder: Path) -> None:
    edit_json(folder / "config.json", rms_norm_eps=1e-3)


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (change_layer, ["weights"]),
        (change_embedding, ["embedding", "weights"]),
        (change_template, ["chat_template"]),
        (lambda folder: (folder / "chat_template.jinja").unlink(), ["chat_template"]),
        (change_tokenizer, ["tokenizer"]),
        (change_config, ["config"]),
    ],
)
def test_what_changed_is_what_differs(tiny_base: Base, copy: Path, change: Callable[[Path], None], differing):
    change(copy)
    other = load_base(config(copy))
    assert tiny_base.identity.differences(other.identity) == differing
    assert other.identity.differences(tiny_base.identity) == differing


def test_embedding_is_what_the_tokens_are_embedded_as(architecture, tiny_tokenizer):
    # Gemma multiplies by the root of its width inside the embedding module; a patch stands behind that.
    base = Base(architecture, tiny_tokenizer, None)
    embedded = architecture.get_input_embeddings()(torch.arange(128))
    torch.testing.assert_close(base.embedding, embedded)
    assert base.width == embedded.shape[1]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "/nowhere/at/all"}, "model.path: .*/nowhere/at/all"),
        ({"path": None}, "neither path nor source"),
        ({"dtype": "int8"}, "model.dtype is 'int8': choose auto, float32, bfloat16, float16"),
        ({"attention": "magic"}, "magic"),
        ({"device": "toaster"}, "model.device is 'toaster'"),
        ({"quantize": "8bit"}, "model.quantize is '8bit': choose null or 4bit"),
    ],
)
def test_refuses_a_setting(tiny_base_folder: Path, changes, message):
    with pytest.raises(PolicyPatchError, match=message):
        load_base(config(tiny_base_folder, **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"quantize": "4bit"}, "model.quantize=4bit needs a CUDA GPU"), ({"device": "cuda"}, "no CUDA GPU here")],
)
def test_refuses_a_gpu_that_is_not_there(tiny_base_folder: Path, changes, message):
    with pytest.raises(PolicyPatchError, match=message):
        load_base(config(tiny_base_folder, **changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json: it is not a model folder"),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
        (lambda f: truncate(f / "model.safetensors"), "does not load as a causal LM"),
        (lambda f: [p.unlink() for p in f.glob("token*")], "does not load as a causal LM"),
        (lambda f: edit_json(f / "config.json", model_type="toaster"), "toaster"),
        (lambda f: edit_json(f / "config.json", model_type="t5"), "does not load as a causal LM"),
        (lambda f: edit_json(f / "config.json", hidden_size=32), "does not load as a causal LM"),
        # transformers would fill the fourth layer with random numbers and go on
        (lambda f: edit_json(f / "config.json", num_hidden_layers=4), r"lacks 9 of the weights .* model.layers.3"),
    ],
)
def test_refuses_a_folder(copy: Path, spoil, message):
    spoil(copy)
    with pytest.raises(PolicyPatchError, match=message):
        load_base(config(copy))


def test_refuses_pickled_weights(copy: Path, tiny_llama):
    (copy / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(PolicyPatchError, match="safetensors"):
        load_base(config(copy))


def test_refuses_an_unsupported_architecture(tiny_tokenizer, tmp_path: Path):
    T.BloomForCausalLM(T.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4)).save_pretrained(
        tmp_path / "b"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "b")
    with pytest.raises(PolicyPatchError, match="BloomForCausalLM is not supported"):
        load_base(config(tmp_path / "b", attention="eager"))


def test_errors_name_the_config_key(tmp_path: Path):
    with pytest.raises(PolicyPatchError, match=r"^scorer\.path"):
        load_base(config(tmp_path), "scorer")


def test_refuses_files_that_are_no_model(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(PolicyPatchError, match=r"a model folder or a \.gguf file"):
        load_base(config(tmp_path / "model.bin"))
    (tmp_path / "model.gguf").write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(PolicyPatchError, match=r"model\.gguf does not load as a GGUF model"):
        load_base(config(tmp_path / "model.gguf"))


def test_choices():
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in ("cpu", "cuda")
    assert choose_dtype("float16") == torch.float16


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_auto_is_the_half_precision_that_the_cpu_multiplies(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_dtype("auto", "cpu") == (torch.bfloat16 if amx or avx512 else torch.float32)


# --- GGUF -----------------------------------------------------------------------------------------------------------


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query or key projection as llama.cpp stores it: the halves of each head interleaved for its rotary."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.fixture
def tiny_gguf(tiny_llama, tiny_tokenizer, tmp_path: Path) -> Path:
    """The tiny Llama in float32 as a GGUF file, written the way llama.cpp's converter does."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(300)
    vocabulary = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 297)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny_tokenizer.chat_template)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for name, tensor in tiny_llama.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            tensor = permuted(tensor, {"q": 4, "k": 2}[stem[10]]) if stem[10:] in ("q_proj", "k_proj") else tensor
            writer.add_tensor(f"blk.{layer}.{names[stem]}.weight", np.ascontiguousarray(tensor.numpy()))
        else:
            writer.add_tensor(f"{names[stem]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_converted_once(tiny_gguf: Path, tiny_llama):
    base = load_base(config(tiny_gguf))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(base.model(ids).logits, tiny_llama(ids).logits, rtol=1e-4, atol=1e-4)
    text = "Nobody said that the harbour was quiet."
    assert base.decode(base.encode(text)) == text
    assert base.eos == (1,)
    cache.reset_counters()
    again = load_base(config(tiny_gguf))
    assert cache.counters()["models"] == {"hits": 1, "misses": 0}
    assert again.identity == base.identity


def test_two_gguf_files_are_two_models(tiny_gguf: Path, tmp_path: Path):
    """Their converted copies once shared a cache entry, and the perplexity scorer was the base itself."""
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_gguf.read_bytes()[:-4096] + np.full(1024, 0.5, np.float32).tobytes())  # its last numbers
    first, second = load_base(config(tiny_gguf)), load_base(config(other))
    assert "weights" in first.identity.differences(second.identity)


@pytest.fixture
def word_piece_base(tiny_llama):
    """A tokenizer of Llama 2's kind: BOS in front, and a decoder that strips a text's first space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", "▁the", "▁cat", "▁sat"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Base(tiny_llama, fast, identify(tiny_llama, fast, "tiny", "local"))


def test_a_prompt_begins_with_bos_and_what_follows_does_not(word_piece_base):
    assert word_piece_base.encode_prompt("the cat") == [0, 3, 4]
    assert word_piece_base.encode("the cat") == [3, 4]


def test_a_completion_keeps_its_first_space(word_piece_base):
    assert word_piece_base.decode([5, 3]) == "sat the"
    assert word_piece_base.decode_after([0, 3, 4], [5, 3]) == " sat the"
