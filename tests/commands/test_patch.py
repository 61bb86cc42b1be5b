"""`policypatch info | diff | verify | keygen | sign` as they are typed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.commands.patch import distance, figures_that_differ, settings_that_differ
from policypatch.model.base import Base
from policypatch.patch.artifact import VECTORS, Patch, digest, save
from policypatch.patch.manifest import Manifest

ROW = {"risk": "toxicity", "split": "rtp", "metric": "toxic_rate", "judge": "svm", "low": 0.1, "high": 0.3, "n": 50}


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


@pytest.fixture
def patch(tiny_base: Base, tmp_path: Path):
    """patch(folder, **fields) -> a folder with a patch for the tiny base."""

    def make(folder: str, vectors: torch.Tensor | None = None, **fields) -> Path:
        vectors = tiny_base.embedding[4:8].float().clone() if vectors is None else vectors
        rows = [ROW | {"arm": "base", "value": 0.4}, ROW | {"arm": "patch", "value": 0.2}]
        known = {"name": "tox", "version": "1.0.0", "risks": ["toxicity"], "created": "2026-11-25T00:00:00+00:00"}
        known |= {"scorecard": rows, "training": {"dpo": {"beta": 0.1}}}
        shape = {"length": vectors.shape[0], "width": vectors.shape[1], "sha256": digest(vectors)}
        manifest = Manifest(**(known | shape | {"base": tiny_base.identity} | fields))
        return save(Patch(vectors, manifest), tmp_path / folder)

    return make


def test_from_keys_to_a_verified_patch(patch, tiny_base_folder: Path, tmp_path: Path):
    folder = patch("a")
    assert call("keygen", tmp_path / "key").exit_code == 0
    assert call("sign", folder, "--key", tmp_path / "key").exit_code == 0
    result = call("verify", folder, "--key", tmp_path / "key.pub", "--model", tiny_base_folder)
    assert result.exit_code == 0, result.output
    assert [line[0] for line in result.stdout.splitlines()] == ["✓"] * 4


def test_what_was_not_checked_is_said(patch):
    said = call("verify", patch("a")).stdout
    assert "– not signed" in said and "give --model to check yours" in said


def test_another_base_is_refused_and_a_mismatch_that_is_allowed_is_named(patch, tiny_base, tiny_base_folder: Path):
    folder = patch("a", base=replace(tiny_base.identity, chat_template="0" * 64))
    result = call("verify", folder, "--model", tiny_base_folder)
    assert result.exit_code == 2 and "differs in chat_template" in result.stderr
    allowed = call("verify", folder, "--model", tiny_base_folder, "--allow-mismatch", "chat_template")
    assert allowed.exit_code == 0 and "made for, but for chat_template" in allowed.stdout


def test_vectors_that_no_training_makes_are_told(patch, tiny_base: Base, tiny_base_folder: Path):
    result = call("verify", patch("a", torch.full((2, tiny_base.width), 100.0)), "--model", tiny_base_folder)
    assert result.exit_code == 1 and "! 2 of 2 vectors are far longer" in result.stdout


def test_a_damaged_patch_is_one_sentence(patch):
    folder = patch("a")
    (folder / VECTORS).write_bytes(b"?")
    for command in (["info"], ["verify"], ["sign", "--key", "none"]):
        result = call(command[0], folder, *command[1:])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and "damaged" in result.stderr


def test_info_says_what_it_is_and_who_signed_it(patch, tmp_path: Path):
    folder = patch("a", name="tox", version="2.0.1")
    said = call("info", folder).stdout
    assert "patch      tox 2.0.1" in said and "signature  none" in said and "toxic rate" in said
    assert max(map(len, said.splitlines())) <= 80
    call("keygen", tmp_path / "key")
    call("sign", folder, "--key", tmp_path / "key")
    assert "names the key" in call("info", folder).stdout


def test_diff_says_settings_figures_and_vectors(patch, tiny_base: Base):
    rows = [ROW | {"arm": "base", "value": 0.4}, ROW | {"arm": "patch", "value": 0.1}]
    moved = tiny_base.embedding[4:8].float() * 2
    newer = patch("b", moved, version="1.1.0", scorecard=rows, training={"dpo": {"beta": 0.5}})
    said = call("diff", patch("a"), newer).stdout.splitlines()
    assert said[:3] == [
        "training.dpo.beta: 0.1 -> 0.5",
        'version: "1.0.0" -> "1.1.0"',
        "patch toxicity rtp toxic_rate svm: 0.2 -> 0.1",
    ]
    assert said[3].endswith("mean cosine 1.000")
    assert call("diff", newer, newer).stdout == "vectors: the same\n"


def test_a_section_that_one_has_not_is_one_line():
    assert settings_that_differ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {}}) == ['a.b: {"c": 1, "d": 2} -> null']
    assert settings_that_differ({"sha256": "x", "a": 1}, {"sha256": "y", "a": 1}) == []


def test_figures_are_those_of_the_patch_alone():
    base = ROW | {"arm": "base", "value": 1.0}
    assert list(figures_that_differ([base], [base | {"value": 2.0}])) == []


def test_distance_by_hand():
    """One vector of two moved by (0, 2) from (3, 0), the other left alone."""
    a, b = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 2.0], [0.0, 1.0]])
    assert distance(a, b) == "vectors: 1 apart on average, of a length of 2; mean cosine 0.916"
    assert distance(a, b[:1]) == "vectors: (2, 2) -> (1, 2)"
