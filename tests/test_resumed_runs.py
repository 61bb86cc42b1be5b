"""Runs that take up what there is: their own folder as an interruption left it, and what other runs have made."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import broken_off, without_costs

from policypatch.errors import PolicyPatchError
from policypatch.patch import artifact


def test_a_run_taken_up_again_comes_to_the_same_end(go, tmp_path: Path, monkeypatch):
    """The first stage is not trained again."""
    from policypatch.train.sft_module import SFTModule

    expected = go("a")
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "another"))  # which does not know what the first has trained
    broken_off(go, "b", monkeypatch)
    monkeypatch.setattr(SFTModule, "training_step", lambda *_: pytest.fail("stage 1 was done"))
    assert without_costs(go("b")) == without_costs(expected)
    for name in ("metrics.csv", "patch/patch.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("damage", ["a bit", "its end", "all"])
def test_a_damaged_checkpoint_is_not_gone_on_from(damage: str, go, tmp_path: Path, monkeypatch, caplog):
    expected = go("a")
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "another"))
    broken_off(go, "b", monkeypatch)
    path = tmp_path / "b" / "checkpoints" / "dpo" / "last.ckpt"
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        patch = torch.load(path, weights_only=True)["state_dict"]["backbone.patch"]
        content[content.index(patch.numpy().tobytes()) + 2] ^= 1  # another patch, and nothing that torch would notice
    path.write_bytes({"a bit": content, "its end": content[:-30], "all": b""}[damage])
    assert without_costs(go("b")) == without_costs(expected)
    assert "the stage is trained from its beginning" in caplog.text
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == (tmp_path / "b" / "metrics.csv").read_bytes()


def test_a_folder_of_another_configuration_is_refused(go, tmp_path: Path):
    go()
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(PolicyPatchError, match="another configuration"):
        go(dpo__beta=0.77)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_an_unfinished_run_goes_on_under_another_evaluation(go, tmp_path: Path, monkeypatch):
    """What was trained stands; a finished run's figures are not overwritten."""
    from policypatch.train.dpo_module import DPOModule
    from policypatch.train.sft_module import SFTModule

    with monkeypatch.context() as broken:
        broken.setattr("policypatch.pipeline.evaluate_arms", lambda *_: pytest.fail("no room"))
        with pytest.raises(pytest.fail.Exception):
            go()
    for stage in (SFTModule, DPOModule):
        monkeypatch.setattr(stage, "training_step", lambda *_: pytest.fail("was trained"))
    with pytest.raises(PolicyPatchError, match="another configuration"):
        go(evaluate__other_prompts=3)  # of which sets are left out of training
    go(evaluate__k=2)
    with pytest.raises(PolicyPatchError, match="another configuration"):
        go(evaluate__k=3)


def test_pairs_and_base_samples_are_made_once_for_all_betas(go, tmp_path: Path):
    go("a", dpo__beta=0.1)
    go("b", dpo__beta=0.5)
    first, second = (json.loads((tmp_path / name / "run.json").read_text())["cache"] for name in "ab")
    assert first["pairs"] == {"hits": 0, "misses": 1}
    assert second["pairs"] == {"hits": 1, "misses": 0}
    # Stage 1 is the same in both, so its reference and its samples are too: only the final patch is sampled.
    assert second["reference"] == {"hits": 1, "misses": 0}
    assert first["completions"] == {"hits": 0, "misses": 4}  # pairs, base, sft, patch
    assert second["completions"] == {"hits": 2, "misses": 1}


def test_a_stage_is_trained_once_for_all_runs_of_its_settings(go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def figures(name: str, stage: str = "") -> list[str]:
        return [line for line in (tmp_path / name / "metrics.csv").read_text().splitlines() if line.startswith(stage)]

    def cost(name: str) -> str:
        return (tmp_path / name / "checkpoints" / "sft" / "cost.json").read_text()

    go("a", dpo__beta=0.1)
    go("b", dpo__beta=0.5)
    go("c", dpo__beta=0.5, sft__lr=0.02)
    go("d", dpo__beta=0.5)
    counts = [json.loads((tmp_path / name / "run.json").read_text())["cache"]["stages"] for name in "abcd"]
    assert [(of["hits"], of["misses"]) for of in counts] == [(0, 2), (1, 1), (0, 2), (2, 0)]
    assert figures("a", "sft") == figures("b", "sft") != figures("c", "sft")
    assert len(figures("b", "dpo")) == len(figures("a", "dpo")) > 0
    assert cost("b") == cost("a") != cost("c")  # what it took when it was trained

    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "another"))
    go("e", dpo__beta=0.5)
    *with_it, without = (artifact.load(tmp_path / name / "patch").vectors for name in "bde")
    assert all(torch.equal(vectors, without) for vectors in with_it)
    assert figures("b") == figures("d") == figures("e")


def test_a_folder_that_was_left_in_the_first_stage_takes_what_another_run_trained(go, tmp_path: Path):
    go("a")
    checkpoint = tmp_path / "b" / "checkpoints" / "sft" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    state = torch.load(tmp_path / "a" / "checkpoints" / "sft" / "last.ckpt", weights_only=True)
    torch.save(state | {"state_dict": {k: v + 1 for k, v in state["state_dict"].items()}}, checkpoint)
    go("b")
    first, second = (artifact.load(tmp_path / name / "patch") for name in "ab")
    assert torch.equal(first.vectors, second.vectors)
