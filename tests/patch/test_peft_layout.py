"""PEFT reads what we write, and computes the same."""

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from policypatch.model.backbone import plain_logits
from policypatch.patch.peft_layout import save_peft


@pytest.fixture
def folder(make_patch, tmp_path: Path) -> Path:
    return save_peft(make_patch(), tmp_path / "peft", num_layers=3, num_attention_heads=4)


def test_files(folder: Path, make_patch):
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"]
    assert torch.equal(tensors["prompt_embeddings"], make_patch().vectors)


def test_config(folder: Path):
    config = PeftConfig.from_pretrained(folder)
    assert config.peft_type == "PROMPT_TUNING"
    assert config.base_model_name_or_path == "tiny"
    assert (config.num_virtual_tokens, config.token_dim) == (5, 64)
    assert config.inference_mode


def test_peft_computes_the_same(folder: Path, make_patch, tiny_llama):
    prompt, completion = [5, 6, 7, 20], [8, 9, 4]
    with torch.no_grad():
        expected = plain_logits(tiny_llama, make_patch().vectors, prompt, completion)
        ids = torch.tensor([[*prompt, *completion]])
        model = PeftModel.from_pretrained(tiny_llama, folder)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    torch.testing.assert_close(logits[8:11], expected, rtol=1e-5, atol=1e-5)  # 5 + 4 - 1 = 8 predicts the first


def test_saving_takes_a_parameter(make_patch, tmp_path: Path):
    vectors = torch.nn.Parameter(torch.ones(2, 64))
    save_peft(make_patch(vectors), tmp_path / "peft", 3, 4)
    assert torch.equal(load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"], vectors)
