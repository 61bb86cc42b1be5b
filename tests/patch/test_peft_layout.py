"""PEFT reads what we write, and computes the same."""

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import plain_logits
from policypatch.patch.peft_layout import load_peft, save_peft


@pytest.fixture
def folder(make_patch, tmp_path: Path) -> Path:
    return save_peft(make_patch(), tmp_path / "peft")


def test_files(folder: Path, make_patch):
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "patch.json",
    ]
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
    save_peft(make_patch(vectors), tmp_path / "peft")
    assert torch.equal(load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"], vectors)


def test_there_and_back_nothing_is_lost(folder: Path, make_patch):
    vectors, base, manifest = load_peft(folder)
    assert torch.equal(vectors, make_patch().vectors) and base == "tiny" and manifest == make_patch().manifest


def test_vectors_stay_what_was_read_when_their_file_is_written_over(folder: Path, make_patch):
    vectors, _, _ = load_peft(folder)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-4 * vectors.numel(), 2)
        file.write(bytes(4 * vectors.numel()))
    assert torch.equal(vectors, make_patch().vectors)


def test_what_peft_itself_trained_is_read(tiny_llama, tmp_path: Path):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path / "theirs")
    vectors, _, manifest = load_peft(tmp_path / "theirs")
    assert torch.equal(vectors, model.prompt_encoder["default"].embedding.weight) and manifest is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_config.json", b'{"peft_type": "LORA"}', "peft_type is 'LORA'"),
        ("adapter_config.json", b"[]", "peft_type is None"),
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_config.json", b'{"peft_type": "PROMPT_TUNING"}', "num_virtual_tokens and token_dim are"),
        (
            "adapter_config.json",
            b'{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "token_dim": 64}',
            "says F32",
        ),
        ("adapter_model.safetensors", b"?", "is damaged"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors"),
    ],
)
def test_what_is_no_prompt_tuning_is_refused(folder: Path, name: str, content: bytes | None, said: str):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(PolicyPatchError, match=said):
        load_peft(folder)
