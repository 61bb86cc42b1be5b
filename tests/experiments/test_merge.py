"""A LoRA run's adapters merged into its base: the folder computes what they do."""

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_run import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from policypatch.commands.base import model_config
from policypatch.errors import PolicyPatchError
from policypatch.model.base import Base
from policypatch.model.load import load_base
from policypatch.model.lora import LoRA, LoRASettings

sys.path.insert(0, str(ROOT / "experiments"))
import merge

IDS = torch.tensor([[0, 5, 6, 17, 40, 8, 9]])


@pytest.fixture
def lora_run(tiny_base: Base, tiny_base_folder: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """What a run of method=lora leaves, and the logits of its adapters."""
    lora = LoRA(tiny_base, LoRASettings(2, 4.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        with lora.state().applied():
            logits = tiny_base.model(IDS).logits
    lora.state().save(tmp_path / "run" / "peft")
    lora.remove()
    OmegaConf.save({"model": model_config(str(tiny_base_folder))}, tmp_path / "run" / "config.yaml")
    return tmp_path / "run", logits


def test_the_merged_base_computes_what_the_adapters_do(lora_run, tiny_base: Base, tmp_path: Path):
    run, expected = lora_run
    result = CliRunner().invoke(merge.app, [str(run), "--out", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tiny_base.model(IDS).logits, expected, atol=1e-2)
    assert not [name for name in made.state_dict() if "lora" in name]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == tiny_base.tokenizer.get_vocab()
    assert (tmp_path / "merged" / "generation_config.json").is_file()
    new = load_base(model_config(str(tmp_path / "merged"))).identity
    assert new.differences(tiny_base.identity) == ["weights"]


def test_what_cannot_be_merged_is_told(lora_run, tmp_path: Path):
    run, _ = lora_run
    (tmp_path / "empty").mkdir()
    for options, told in (
        ([tmp_path / "empty", "--out", tmp_path / "out"], "give a finished run of method=lora"),
        ([run, "--out", run], "choose another --out"),
        ([run, "--out", tmp_path / "out", "--dtype", "int8"], "--dtype is 'int8'"),
    ):
        result = CliRunner().invoke(merge.app, [str(option) for option in options])
        assert isinstance(result.exception, PolicyPatchError) and told in str(result.exception)
    assert not (tmp_path / "out").exists()
