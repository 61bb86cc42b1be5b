"""`policypatch export | import | serve` as they are typed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny_run import patch_of
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.commands.serve import SPARE
from policypatch.model.base import Base
from policypatch.patch.artifact import MANIFEST, load, save
from policypatch.patch.prompt_embeds import CLIENT


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


@pytest.fixture
def folders(tiny_base: Base, tmp_path: Path) -> tuple[Path, Path]:
    return tuple(save(patch_of(tiny_base, name, start), tmp_path / name) for name, start in (("tox", 10), ("bias", 20)))


def test_there_and_back_by_peft_is_the_same_patch(folders, tmp_path: Path):
    assert call("export", folders[0], "--to", "peft", "--out", tmp_path / "peft").exit_code == 0
    assert call("import", tmp_path / "peft", "--out", tmp_path / "back").exit_code == 0
    old, new = load(folders[0]), load(tmp_path / "back")
    assert torch.equal(old.vectors, new.vectors) and old.manifest == new.manifest


def test_a_signature_goes_there_and_back(folders, tmp_path: Path):
    call("keygen", tmp_path / "key"), call("sign", folders[0], "--key", tmp_path / "key")
    call("export", folders[0], "--to", "peft", "--out", tmp_path / "peft")
    for name, arguments, signed in (("same", (), 0), ("renamed", ("--name", "other"), 2)):
        assert call("import", tmp_path / "peft", "--out", tmp_path / name, *arguments).exit_code == 0
        assert call("verify", tmp_path / name, "--key", tmp_path / "key.pub").exit_code == signed


@pytest.mark.parametrize("layout", [{"indent": 7}, {"separators": (",", ":")}, {"sort_keys": True}], ids=str)
def test_a_signed_manifest_goes_there_and_back_byte_for_byte(folders, tmp_path: Path, layout: dict):
    manifest = folders[0] / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), **layout))
    call("keygen", tmp_path / "key"), call("sign", folders[0], "--key", tmp_path / "key")
    assert call("export", folders[0], "--to", "peft", "--out", tmp_path / "peft").exit_code == 0
    assert call("import", tmp_path / "peft", "--out", tmp_path / "back").exit_code == 0
    assert (tmp_path / "back" / MANIFEST).read_bytes() == manifest.read_bytes()
    assert call("verify", tmp_path / "back", "--key", tmp_path / "key.pub").exit_code == 0


def test_a_signature_that_lies_elsewhere_is_not_read(folders, tmp_path: Path):
    call("export", folders[0], "--to", "peft", "--out", tmp_path / "peft")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "peft" / "patch.sig").symlink_to(tmp_path / "secret")
    result = call("import", tmp_path / "peft", "--out", tmp_path / "back")
    assert result.exit_code == 2 and "leads out of its folder" in result.stderr
    assert not (tmp_path / "back" / "patch.sig").exists()


def test_a_model_that_is_not_its_base_is_refused_though_a_manifest_lies_there(folders, tmp_path: Path):
    call("export", folders[0], "--to", "peft", "--out", tmp_path / "peft")
    result = call("import", tmp_path / "peft", "--out", tmp_path / "back", "--model", tmp_path)
    assert result.exit_code == 2 and "config.json" in result.stderr


def test_what_peft_trained_becomes_a_patch_of_a_base(tiny_llama, tiny_base: Base, tiny_base_folder, tmp_path: Path):
    model = get_peft_model(tiny_llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path / "Theirs")
    result = call("import", tmp_path / "Theirs", "--out", tmp_path / "patch")
    assert result.exit_code == 2 and "give the base as --model" in result.stderr
    arguments = ("--model", tiny_base_folder, "--version", "1.0.0", "--risk", "toxicity")
    assert call("import", tmp_path / "Theirs", "--out", tmp_path / "patch", *arguments).exit_code == 0
    made = load(tmp_path / "patch", tiny_base.identity)
    assert torch.equal(made.vectors, model.prompt_encoder["default"].embedding.weight)
    assert (made.manifest.name, made.manifest.version, made.manifest.risks) == ("theirs", "1.0.0", ["toxicity"])


def test_tokens_of_two_patches(folders, tiny_base_folder: Path, tmp_path: Path):
    result = call("export", *folders, "--to", "tokens", "--model", tiny_base_folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "tox: <|tox@1.0.0:0|> to <|tox@1.0.0:3|>" in result.stdout
    assert "! the model may write one" in result.stdout  # the tiny base is random
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 308


def test_embeds_come_with_a_client(folders, tmp_path: Path):
    assert call("export", folders[0], "--to", "embeds", "--dtype", "float16", "--out", tmp_path / "out").exit_code == 0
    assert "torch.float16" in (tmp_path / "out" / CLIENT).read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "tokens"), "give it as --model"),
        (("--to", "gguf", "--model", "BASE"), "is not a GGUF file"),
        (("--to", "peft", "second"), "takes one patch"),
        (("--to", "embeds", "--dtype", "colour"), "model.dtype is 'colour'"),
        (("--to", "tokens", "--model", "BASE", "--default", "tux"), "there is no patch 'tux'"),
        (("--to", "tokens", "--model", "BASE", "--allow-mismatch", "colour"), "allow_mismatch names colour"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    folders, tiny_base_folder, tmp_path: Path, arguments: tuple[str, ...], said: str
):
    places = {"BASE": tiny_base_folder, "second": folders[1]}
    result = call("export", folders[0], *(places.get(a, a) for a in arguments), "--out", tmp_path / "out")
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(folders, tmp_path: Path):
    (tmp_path / "out").mkdir()
    for arguments in (("export", folders[0], "--to", "peft"), ("import", folders[0])):
        assert "exists: choose another --out" in call(*arguments, "--out", tmp_path / "out").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "can be reached from elsewhere: give a key"),
        (("--host", "example.org"), "give an address"),
        (("--api-key-file", "FILE"), "has 5 characters: use 16 or more"),
        (("--api-key-file", "none"), "--api-key-file: none cannot be read"),
        (("--patch", "TOX", "--patch", "TOX"), "two patches are called tox"),
    ],
)
def test_a_server_that_must_not_start(folders, tmp_path: Path, arguments: tuple[str, ...], said: str):
    (tmp_path / "key").write_text("short\n")
    places = {"FILE": tmp_path / "key", "TOX": folders[0]}
    result = call("serve", "--model", "none", *(places.get(a, a) for a in arguments))
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_a_server_takes_so_many_connections_and_no_more(tiny_base_folder: Path, monkeypatch):
    started = []
    monkeypatch.setattr("uvicorn.run", lambda app, **options: started.append(options))
    result = call("serve", "--model", tiny_base_folder, "--rows", 2, "--waiting", 3)
    assert result.exit_code == 0 and "models: base" in result.stdout
    assert started[0]["limit_concurrency"] == 2 + 3 + SPARE


def test_a_server_refuses_a_patch_of_another_base(tiny_base: Base, tiny_base_folder: Path, tmp_path: Path):
    other = patch_of(replace(tiny_base, identity=replace(tiny_base.identity, weights="0" * 64)), "tox", 10)
    result = call("serve", "--model", tiny_base_folder, "--patch", save(other, tmp_path / "tox"))
    assert result.exit_code == 2 and "differs in weights" in result.stderr
