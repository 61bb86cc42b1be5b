"""PEFT's prompt-tuning files: one tensor `prompt_embeddings` (L, D) float32 and `adapter_config.json`.

The numbers are the patch's own; what PEFT has no place for (base digests, scorecard) stands in the manifest, which is
laid beside its files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import atomic_folder, has_own, parse_json, read_limited, write_json
from policypatch.patch.artifact import BYTES, MANIFEST, MANIFEST_LIMIT, TENSOR, Patch, check_header, write_manifest
from policypatch.patch.manifest import Manifest

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_peft(patch: Patch, folder: Path, written: bytes | None = None) -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`.

    PEFT takes the figures of the architecture that are null here from the base. The manifest beside them is `written`,
    the bytes that it was read from, where these are given.
    """
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": patch.manifest.base.id,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": patch.manifest.length,
        "token_dim": patch.manifest.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": None,
        "num_layers": None,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }
    with atomic_folder(folder) as temporary:
        save_file({TENSOR: patch.vectors.detach().cpu().contiguous()}, temporary / ADAPTER)
        write_json(temporary / CONFIG, config)
        write_manifest(temporary / MANIFEST, patch.manifest, written)
    return folder


def load_peft(folder: Path) -> tuple[Tensor, str | None, Manifest | None]:
    """Read a prompt-tuning adapter, ours or anyone's.

    Returns:
        the vectors (L, D) float32; the base that it names; the manifest, where one lies beside it.

    Raises:
        PolicyPatchError: a file is missing or damaged, the adapter is of another kind, or it holds other tensors.
    """
    for name in (ADAPTER, CONFIG):
        if not has_own(folder, name):
            raise PolicyPatchError(f"{folder} is no PEFT adapter: it has no {name}")
    config = parse_json(read_limited(folder / CONFIG, MANIFEST_LIMIT), folder / CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "PROMPT_TUNING":
        raise PolicyPatchError(
            f"{folder / CONFIG}: peft_type is {kind!r}: only PROMPT_TUNING is vectors before the input"
        )
    shape = [config.get("num_virtual_tokens"), config.get("token_dim")]
    if not all(isinstance(size, int) and 0 < size < 1 << 31 for size in shape):
        raise PolicyPatchError(f"{folder / CONFIG}: num_virtual_tokens and token_dim are {shape}: expected two sizes")
    check_header(folder / ADAPTER, shape, tuple(BYTES), CONFIG)
    try:
        # A copy also of float32: what safetensors gives is the file itself, which may change after it was looked at.
        vectors = load_file(folder / ADAPTER)[TENSOR].to(torch.float32, copy=True)
    except SafetensorError as error:
        raise PolicyPatchError(f"{folder / ADAPTER} is damaged: {error}") from error
    manifest = None
    if has_own(folder, MANIFEST):
        written = parse_json(read_limited(folder / MANIFEST, MANIFEST_LIMIT), folder / MANIFEST)
        manifest = Manifest.from_json(written, str(folder / MANIFEST))
    base = config.get("base_model_name_or_path")
    return vectors, base if isinstance(base, str) else None, manifest
