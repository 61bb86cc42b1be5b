"""Loading a base model: from the hub, a folder or a GGUF file, frozen, with the digests a patch is bound to."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from omegaconf import DictConfig
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from policypatch.errors import PolicyPatchError
from policypatch.files.cache import content_key, entry
from policypatch.files.sources import fetch, identity
from policypatch.model.backbone import check_tree
from policypatch.model.form import PLAIN, Form
from policypatch.patch.manifest import BaseIdentity

log = logging.getLogger(__name__)

# What transformers and safetensors raise on files that are not a model, or not a whole one.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
SAMPLED = 4096  # values of each weight tensor that go into the weights digest


@dataclass(frozen=True)
class Base:
    """A frozen causal LM with its tokenizer and identity."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseIdentity

    @property
    def embedding(self) -> Tensor:
        """(V, D) what the tokens are embedded as."""
        return embedding_of(self.model)

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def context(self) -> int | None:
        """Positions the model has, None where it sets no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def encode_prompt(self, text: str, form: Form = PLAIN) -> list[int]:
        """Token ids of what a sequence begins with.

        Plain text stands behind the BOS token of a base trained with one; a chat is what the base's own template
        writes, up to where the response begins.

        Raises:
            PolicyPatchError: a chat, and the base has no chat template or one that refuses these messages.
        """
        if form.chat:
            return self.encode_messages(form.messages(text))
        ids = self.tokenizer(form.before + text).input_ids
        return ids[:-1] if ids and ids[-1] in self.eos else ids  # some tokenizers end what is to be continued

    def encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat, up to where the response begins.

        Raises:
            PolicyPatchError: the base has no chat template, or one that refuses these messages.
        """
        if not self.tokenizer.chat_template:
            raise PolicyPatchError(
                f"{self.identity.id} has no chat template, and the prompts are requests: "
                "choose a base that was tuned for chats"
            )
        try:
            written = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError) as error:
            raise PolicyPatchError(f"the chat template of {self.identity.id} refuses a chat: {error}") from error
        return self.encode(written)  # the template itself writes the special tokens

    @property
    def start(self) -> tuple[int, ...]:
        """What a text begins after, so that its first token has a probability: BOS, else EOS; empty without either."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return tuple(token for token in known if token is not None)[:1]

    def encode(self, text: str) -> list[int]:
        """Token ids of text that follows other text: no special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, spaces as they are."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Text of a completion's token ids as it stands behind its prompt.

        Decoded alone, it would lose its first space under SentencePiece tokenizers (Llama 2, Mistral).
        """
        before, whole = self.decode(prompt), self.decode([*prompt, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self.decode(tokens)


def embedding_of(model: PreTrainedModel) -> Tensor:
    """(V, D) what a model's tokens are embedded as."""
    weight, scale = model.get_input_embeddings().weight, embedding_scale(model)
    return weight if scale is None else weight * scale.to(weight)


def embedding_scale(model: PreTrainedModel) -> Tensor | None:
    """What a model multiplies its embedding matrix by before it is an input (Gemma 3), so that a patch must as well."""
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    return None if scale is None else torch.as_tensor(scale)


def load_base(cfg: DictConfig, key: str = "model") -> Base:
    """Load what `conf/model/*.yaml` describes.

    Args:
        cfg: name, source or path, dtype, device, attention, quantize.
        key: the config key named in errors.

    Raises:
        PolicyPatchError: the source cannot be had, is no causal LM, or its architecture is not supported.
    """
    folder, where = _folder(cfg, key)
    dtype, device = choose_dtype(cfg.dtype, cfg.device), choose_device(cfg.device)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": cfg.attention}
    if cfg.quantize == "4bit":
        options["quantization_config"] = _four_bit(dtype, key)
        options["device_map"] = device
    elif cfg.quantize is not None:
        raise PolicyPatchError(f"{key}.quantize is {cfg.quantize!r}: choose null or 4bit")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        raise PolicyPatchError(
            f"{key}: {folder} does not load as a causal LM with safetensors weights: {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
        raise PolicyPatchError(
            f"{key}: {folder} lacks {len(missing)} of the weights that its config.json asks for, {missing[0]} the first"
        )
    if cfg.quantize is None:
        model.to(device)
    model.eval().requires_grad_(False)
    check_tree(model)
    return Base(model, tokenizer, identify(model, tokenizer, cfg.name, where))


def choose_device(name: str) -> str:
    """`auto` is a GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise PolicyPatchError(f"model.device is {name!r}: choose auto, cpu or cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise PolicyPatchError(f"model.device is {name} but there is no CUDA GPU here: set model.device=auto")
    return name


def choose_dtype(name: str, device: str = "auto") -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it (a GPU, a CPU with AMX), float32 elsewhere."""
    if name != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if name not in known:
            raise PolicyPatchError(f"model.dtype is {name!r}: choose auto, {', '.join(known)}")
        return known[name]
    if choose_device(device) != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def identify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, revision: str
) -> BaseIdentity:
    """The digests of a loaded model; under a second for 135 M parameters. Without a tokenizer its digests are empty."""
    embedding = model.get_input_embeddings().weight
    weights = hashlib.sha256()
    for parameter_name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // SAMPLED)]
        weights.update(f"{parameter_name} {tuple(parameter.shape)} ".encode() + _bf16_bytes(sampled))
    vocabulary = template = ""
    if tokenizer is not None:
        vocabulary = hashlib.sha256(_vocabulary(tokenizer).encode()).hexdigest()
        template = hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
    return BaseIdentity(
        id=name,
        revision=revision,
        embedding=hashlib.sha256(_bf16_bytes(embedding)).hexdigest(),
        weights=weights.hexdigest(),
        config=hashlib.sha256(json.dumps(_architecture(model), sort_keys=True).encode()).hexdigest(),
        tokenizer=vocabulary,
        chat_template=template,
    )


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps(sorted(tokenizer.get_vocab().items()))


def _bf16_bytes(values: Tensor) -> bytes:
    return values.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def _architecture(model: PreTrainedModel) -> dict[str, Any]:
    """The settings that shape the computation; not where it came from, nor what it is loaded as."""
    config = model.config.to_dict()
    passing = (
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "quantization_config",
    )
    return {k: v for k, v in config.items() if k not in passing and not k.startswith("_")}


def _folder(cfg: DictConfig, key: str) -> tuple[Path, str]:
    """A local folder that transformers loads, and the revision to record."""
    source = {"path": cfg.path} if cfg.path else cfg.source
    name = f"{key}.path" if cfg.path else f"{key}.source"
    if source is None:
        raise PolicyPatchError(f"{key} says neither path nor source: set {key}.path to a folder or a GGUF file")
    path = fetch(source, name)
    if path.is_dir() and cfg.path:
        revision, known = "local", {}  # a folder of one's own is told by its weights; hashing it whole takes minutes
    else:
        known = identity(source, name)
        revision = str(known.get("revision") or known.get("wheel") or "local")
    if path.is_file():
        if path.suffix != ".gguf":
            raise PolicyPatchError(f"{name} is {path.name}: give a model folder or a .gguf file")
        try:
            return _from_gguf(path, known), revision
        except UNREADABLE as error:
            raise PolicyPatchError(f"{name}: {path.name} does not load as a GGUF model: {error}") from error
    if not (path / "config.json").is_file():
        raise PolicyPatchError(f"{name}: {path} has no config.json: it is not a model folder")
    return path, revision


def _from_gguf(path: Path, known: dict[str, Any]) -> Path:
    """De-quantise once (about 20 s for 135 M parameters) and keep a float32 safetensors copy in the cache."""

    def build(folder: Path) -> None:
        log.info("de-quantising %s", path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # What was read is a plain float32 model; the marks of the file format would make it refuse to be saved.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        AutoConfig.from_pretrained(folder)

    about = {
        "file": known,
        "dtype": "float32",
        "versions": {name: version(name) for name in ("transformers", "gguf")},
    }
    return entry("models", content_key(**about), build, about=about)


def _four_bit(dtype: torch.dtype, key: str) -> Any:
    if not torch.cuda.is_available():
        raise PolicyPatchError(f"{key}.quantize=4bit needs a CUDA GPU: set {key}.quantize=null")
    if find_spec("bitsandbytes") is None:
        raise PolicyPatchError(f"{key}.quantize=4bit needs the package bitsandbytes: pip install 'policypatch[4bit]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")
