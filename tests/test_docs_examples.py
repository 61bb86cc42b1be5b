"""The examples of docs/patches.md, and of a patch's card, run as they stand there, in their order."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT, patch_of
from tiny_server import listening
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.model import applied
from policypatch.model.base import Base
from policypatch.patch.artifact import load, save
from policypatch.serve.engine import Engine

BLOCKS = re.findall(r"```(\w*)([^\n]*)\n(.*?)```", (ROOT / "docs" / "patches.md").read_text("utf-8"), re.S)


def test_they_run(tiny_base: Base, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    (tmp_path / "base").symlink_to(tiny_base_folder)
    for name, start in (("tox", 10), ("bias", 20)):
        save(patch_of(tiny_base, name, start), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    commands = [line for language, _, block in BLOCKS if not language for line in block.splitlines()]
    assert len(commands) >= 11
    for command in commands:
        name, *arguments = shlex.split(command)
        result = CliRunner().invoke(app, arguments)
        assert (name, result.exit_code) == ("policypatch", 0), f"{command}: {result.output}"
    capsys.readouterr()
    for language, how, block in BLOCKS:
        if language and how != " served":
            exec(compile(block, "docs/patches.md", "exec"), {})
    assert capsys.readouterr().out == "tox_bias ['tox', 'bias']\n"
    assert torch.equal(load(tmp_path / "both").vectors, load(tmp_path / "both_again").vectors)


def test_the_one_that_asks_a_server_runs(tiny_base: Base):
    patches = {name: patch_of(tiny_base, name, start).vectors for name, start in (("tox", 10), ("bias", 20))}
    blocks = [block for language, how, block in BLOCKS if (language, how) == ("python", " served")]
    with listening(tiny_base, Engine(tiny_base, patches, rows=2, context=128, waiting=2)) as address:
        for block in blocks:
            assert "http://127.0.0.1:8000/" in block
            told: dict = {}
            exec(compile(block.replace("http://127.0.0.1:8000", address), "docs/patches.md", "exec"), told)
            assert told["answer"].model == "base+tox"
            assert told["answer"].usage.completion_tokens > 0
            told["client"].close()
    assert len(blocks) == 1


def test_the_cards_own_run(tiny_base: Base, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    card = (save(patch_of(tiny_base, "tox", 10), tmp_path / "tox") / "README.md").read_text("utf-8")
    blocks = re.findall(r"```(\w*)\n(.*?)```", card, re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    for language, block in blocks:
        code = textwrap.dedent(block).replace("this/folder", "tox").replace("BASE", str(tiny_base_folder))
        if language == "python":
            model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
            exec(compile(code, "README.md", "exec"), {"model": model, "tokenizer": tiny_base.tokenizer})
            assert applied.state_of(model) is not None
        elif "serve" not in code:
            _, *arguments = shlex.split(code, comments=True)
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{code}: {result.output}"
    assert {"model", "adapter"} <= {path.name for path in tmp_path.iterdir()}
