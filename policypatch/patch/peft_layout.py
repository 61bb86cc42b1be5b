"""PEFT's prompt-tuning files: one tensor `prompt_embeddings` (L, D) float32 and `adapter_config.json`.

The numbers are the patch's own; what PEFT has no place for (base fingerprint, scorecard) stays in the manifest.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from policypatch.files.atomic import atomic_folder, write_json
from policypatch.patch.artifact import TENSOR, Patch


def save_peft(patch: Patch, folder: Path, num_layers: int, num_attention_heads: int) -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`.

    The two architecture figures are PEFT's own demand for its configuration; prompt tuning does not use them.
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
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }
    with atomic_folder(folder) as temporary:
        save_file({TENSOR: patch.vectors.contiguous()}, temporary / "adapter_model.safetensors")
        write_json(temporary / "adapter_config.json", config)
    return folder
