"""Loading a base model: from the hub, a folder or a GGUF file, frozen, whole or this rank's share of it."""

from __future__ import annotations

import logging
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from policypatch import ranks
from policypatch.errors import PolicyPatchError
from policypatch.files.cache import content_key, entry
from policypatch.files.sources import fetch, identity
from policypatch.model.backbone import check_tree
from policypatch.model.base import Base, identify
from policypatch.model.sharded import keep_step, shard

log = logging.getLogger(__name__)

# What transformers and safetensors raise on files that are not a model, or not a whole one.
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)

# Said aloud: left out, transformers asks on a terminal whether to run the code of a model's folder.
NO_CODE = {"trust_remote_code": False}


def load_base(cfg: DictConfig, key: str = "model", sharded: bool = False) -> Base:
    """Load what `conf/model/*.yaml` describes.

    Args:
        cfg: name, source or path, dtype, device, attention, quantize.
        key: the config key named in errors.
        sharded: every rank has a share of the layers (`policypatch.model.sharded`); all of them call this.

    Raises:
        PolicyPatchError: the source cannot be had, is no causal LM, or its architecture is not supported.
    """
    if sharded:
        base = ranks.in_turn(lambda: _loaded(cfg, key, shared_out=True))
        keep_step(base.model)
    else:
        base = _loaded(cfg, key, shared_out=False)
    check_tree(base.model)
    return base


def _loaded(cfg: DictConfig, key: str, shared_out: bool) -> Base:
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
            folder, use_safetensors=True, output_loading_info=True, **options, **NO_CODE
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except UNREADABLE as error:
        raise PolicyPatchError(
            f"{key}: {folder} does not load as a causal LM with safetensors weights: {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
        raise PolicyPatchError(
            f"{key}: {folder} lacks {len(missing)} of the weights that its config.json asks for, {missing[0]} the first"
        )
    model.eval().requires_grad_(False)
    base = Base(model, tokenizer, identify(model, tokenizer, cfg.name, where))
    if shared_out:
        shard(model, device)
    elif cfg.quantize is None:
        model.to(device)
    return base


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
    """`auto` is bfloat16 where the hardware multiplies it (a GPU, a CPU with AMX or AVX512_BF16), float32 elsewhere."""
    if name != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if name not in known:
            raise PolicyPatchError(f"model.dtype is {name!r}: choose auto, {', '.join(known)}")
        return known[name]
    if choose_device(device) != "cpu":
        return torch.bfloat16
    multiplies = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if multiplies else torch.float32


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
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **NO_CODE)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **NO_CODE)
        # What was read is a plain float32 model; the marks of the file format would make it refuse to be saved.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        AutoConfig.from_pretrained(folder, **NO_CODE)

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
