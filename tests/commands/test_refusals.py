"""Patches that no command takes together: of different bases, of parents in a circle, too long for the context."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from tiny_run import overrides, patch_of
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.model.base import Base
from policypatch.patch.artifact import Patch, save

COMMANDS = ("stack", "compose", "squash", "audit")
Refused = Callable[[str, Sequence[Path]], Result]


@pytest.fixture
def refused(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """refused(command, patches' folders) -> its result, which is one sentence."""
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    own = ("risk.", "~risk", "+risk", "scorer")
    settings = [o for o in overrides(tiny_base_folder, tmp_path) if o.startswith(own)]
    settings = [*settings, "others=none", "model.dtype=float32"]

    def call(command: str, folders: Sequence[Path]) -> Result:
        words = [command, *map(str, folders), "--out", str(tmp_path / "out")]
        if command != "stack":
            words += ["--model", str(tiny_base_folder), *(word for o in settings for word in ("--set", o))]
        result = CliRunner().invoke(app, words, env={"COLUMNS": "100"})
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
        assert not (tmp_path / "out").exists()
        return result

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_different_bases(command: str, refused: Refused, tiny_base: Base, tmp_path: Path):
    other = replace(tiny_base.identity, weights="0" * 64)
    folders = [save(patch_of(tiny_base, "tox", 4), tmp_path / "tox")]
    folders.append(save(patch_of(tiny_base, "foreign", 20, base=other), tmp_path / "foreign"))
    assert "differ in weights: stack patches of one base" in refused(command, folders).stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_parents_in_a_circle(command: str, refused: Refused, tiny_base: Base, tmp_path: Path):
    """Digests lead from either to the other, which no history can."""
    tox, safe = (patch_of(tiny_base, name, start) for name, start in (("tox", 4), ("safe", 20)))
    both = [(tox, safe), (safe, tox)]
    made = [Patch(one.vectors, replace(one.manifest, parents=[of.manifest.as_parent])) for one, of in both]
    folders = [save(patch, tmp_path / patch.manifest.name) for patch in made]
    assert "tox is among its own parents" in refused(command, folders).stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_more_vectors_than_the_context_has_positions(command: str, refused: Refused, tiny_base: Base, tmp_path: Path):
    folders = [save(patch_of(tiny_base, name, 4, 290), tmp_path / name) for name in ("tox", "safe")]
    told = refused(command, folders).stderr
    assert "580 vectors" in told and "context of" in told and "512" in told
