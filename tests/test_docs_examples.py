"""The examples of docs/patches.md, run as they stand there, in their order."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT, patch_of
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.model.base import Base
from policypatch.patch.artifact import load, save

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
        if language and how != " norun":  # those need a server
            exec(compile(block, "docs/patches.md", "exec"), {})
    assert capsys.readouterr().out == "tox_bias ['tox', 'bias']\n"
    assert torch.equal(load(tmp_path / "both").vectors, load(tmp_path / "both_again").vectors)
