"""A stack distilled into a shorter patch: what it learns from, that it comes nearer, and what the command leaves."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_run import composed, overrides, patch_of, texts
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.data.datamodule import Batch
from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone, plain_logits
from policypatch.model.base import Base
from policypatch.model.form import CHAT, PLAIN
from policypatch.model.sampling import Sampling
from policypatch.patch.artifact import load, save
from policypatch.squash import SquashModule, drawn, examples, shortened, squashed

SAMPLING = Sampling(max_new_tokens=8)


def behind(stack: torch.Tensor, base: Base, vectors: torch.Tensor) -> PrefixBackbone:
    """A patch that is compared with the base behind the stack."""
    backbone = PrefixBackbone(base.model, vectors)
    backbone.anchor = stack
    return backbone


@pytest.fixture
def stack(tiny_base: Base) -> torch.Tensor:
    return torch.cat([tiny_base.embedding[4:8], tiny_base.embedding[20:24]]).float() * 3


def test_it_begins_with_vectors_of_the_stack_in_their_order():
    """Of 8 the middles of halves are 2 and 6, of quarters 1, 3, 5, 7."""
    stack = torch.arange(8.0)[:, None]
    assert shortened(stack, 2).flatten().tolist() == [2, 6]
    assert shortened(stack, 4).flatten().tolist() == [1, 3, 5, 7]
    assert shortened(stack, 7).flatten().tolist() == [0, 1, 2, 4, 5, 6, 7]
    for length in (0, 8, 9):
        with pytest.raises(PolicyPatchError, match=f"--length is {length}.*less than the stack's 8"):
            shortened(stack, length)


def test_the_anchor_is_the_base_behind_the_stack(tiny_base: Base, stack):
    backbone = behind(stack, tiny_base, stack[:3])
    rows = examples(tiny_base, stack, [(PLAIN, texts(3)), (CHAT, texts(2, 50))], SAMPLING, 0, 32)
    assert len(rows) == 5 and all(len(row.item.completions) == 1 for row in rows)
    tree = backbone.tree([row.item for row in rows])
    with torch.no_grad():
        found = backbone.divergence(tree)
        for number, row in enumerate(rows):
            prompt, completion = list(row.item.prompt), list(row.item.completions[0])
            ours, theirs = (
                plain_logits(tiny_base.model, vectors, prompt, completion).log_softmax(-1)
                for vectors in (stack[:3], stack)
            )
            by_hand = (theirs.exp() * (theirs - ours)).sum(-1).mean()
            assert found[number].item() == pytest.approx(by_hand.item(), rel=1e-3, abs=1e-5)
        same = behind(stack, tiny_base, stack)
        assert same.divergence(tree).abs().max() < 1e-5


def test_prompts_are_drawn_of_each_set_alike():
    """Six of a set of 9 and one of 3: three of either, none from the front alone; what is short gives what it has."""
    plain, scary = [f"p{i}" for i in range(9)], [f"s{i}" for i in range(3)]
    six = drawn([plain, scary], 6, 0)
    assert sum(text in scary for text in six) == 3 and len(set(six)) == 6
    assert six == drawn([plain, scary], 6, 0) != drawn([plain, scary], 6, 1)
    assert len(drawn([plain, scary], 11, 0)) == 11 and set(drawn([plain, plain[:2]], 20, 0)) == set(plain)
    assert {text for seed in range(30) for text in drawn([plain], 2, seed)} == set(plain)


def test_an_answer_in_a_chat_may_be_longer_than_a_text(tiny_base: Base, stack):
    """In the tiny base hardly anything ends itself: as long as they may be."""
    rows = examples(tiny_base, stack, [(PLAIN, texts(3)), (CHAT, texts(3, 50))], SAMPLING, 0, 32, 20)
    lengths = [len(row.item.completions[0]) for row in rows]
    assert max(lengths[:3]) <= 9 and max(lengths[3:]) > 9


def test_training_comes_nearer_to_the_stack_and_goes_on_where_it_stopped(tiny_base: Base, stack, tmp_path: Path):
    rows = examples(tiny_base, stack, [(PLAIN, texts(20))], SAMPLING, 0, 32)
    cfg = composed(["sft.steps=40", "sft.lr=0.05", "sft.batch_size=8"])

    def apart(vectors: torch.Tensor) -> float:
        backbone = behind(stack, tiny_base, vectors)
        with torch.no_grad():
            return backbone.divergence(backbone.tree([row.item for row in rows])).mean().item()

    def train(folder: str, steps: int | None = None) -> torch.Tensor:
        stage = cfg.sft if steps is None else OmegaConf.merge(cfg.sft, {"steps": steps})
        return squashed(tiny_base, stack, 3, rows, stage, cfg.trainer, tmp_path / folder, 0, 512)

    made = train("a")
    assert apart(made) < 0.7 * apart(shortened(stack, 3))
    assert torch.equal(train("a"), made)  # it is done already
    assert (tmp_path / "a" / "checkpoints" / "squash" / "last.ckpt").exists()


def test_training_that_was_killed_goes_on(tiny_base: Base, stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = examples(tiny_base, stack, [(PLAIN, texts(20))], SAMPLING, 0, 32)
    cfg = composed(["sft.steps=12", "sft.batch_size=8"])

    def train(folder: str) -> torch.Tensor:
        return squashed(tiny_base, stack, 3, rows, cfg.sft, cfg.trainer, tmp_path / folder, 0, 512)

    expected, losses, steps = train("whole"), SquashModule.losses, []

    def dies(module: SquashModule, batch: Batch):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return losses(module, batch)

    with monkeypatch.context() as patched:
        patched.setattr(SquashModule, "losses", dies)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train("killed")
    assert torch.equal(train("killed"), expected)
    assert (tmp_path / "killed" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


@pytest.fixture
def squash(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    left = (
        "model.",
        "patch.",
        "sft.steps",
        "teacher.",
        "dpo.",
        "logger",
        "trainer=",
        "seed",
        "risk=",
        "evaluate.costs",
    )
    settings = [o for o in overrides(tiny_base_folder, tmp_path, "joint", others="all") if not o.startswith(left)]
    settings += ["model.dtype=float32"]

    def call(*arguments: object):
        chosen = [word for setting in settings for word in ("--set", setting)]
        return CliRunner().invoke(app, ["squash", *map(str, arguments), "--model", str(tiny_base_folder), *chosen])

    return call


def test_the_command_leaves_a_patch_with_the_stacks_figures_beside_its_own(squash, tiny_base: Base, tmp_path: Path):
    save(patch_of(tiny_base, "tox", 4), tmp_path / "tox")
    save(patch_of(tiny_base, "both", 20, risks=["gender_bias", "harmfulness"]), tmp_path / "both")
    result = squash(tmp_path / "tox", tmp_path / "both", "--out", tmp_path / "short", "--length", 3, "--steps", 4)
    assert result.exit_code == 0, result.output
    made = load(tmp_path / "short", tiny_base.identity)
    assert made.vectors.shape == (3, tiny_base.width)
    risks = ["toxicity", "gender_bias", "harmfulness"]
    assert made.manifest.name == "tox_both-squashed" and made.manifest.risks == risks
    assert [parent.name for parent in made.manifest.parents] == ["tox_both"]
    assert made.manifest.training["squash"]["rows"] > 30  # 12 and 12 prompts, 8 requests, benign ones
    for share in made.manifest.training["squash"]["kept"]:
        assert share["reduction"] > 0 and (share["low"] is None or share["low"] <= share["share"] <= share["high"])
        assert f"{share['metric']} {share['judge']}: keeps {share['share']:.0%} [".replace(" None", "") in result.stdout
    arms = {(row["arm"], row["risk"]) for row in made.manifest.scorecard}
    assert {(arm, risk) for arm in ("base", "stack", "squashed") for risk in [*risks, "utility"]} <= arms
    # Every risk of the stack is measured by all prompts of its sets, not by the few of an other risk's.
    counts = {row["risk"]: row["n"] for row in made.manifest.scorecard if row["metric"] in ("toxic_rate", "gas", "asr")}
    assert counts == {"toxicity": 8, "gender_bias": 6, "harmfulness": 5}


def test_what_cannot_be_squashed_is_told(squash, tiny_base: Base, tmp_path: Path):
    save(patch_of(tiny_base, "tox", 4), tmp_path / "tox")
    long = squash(tmp_path / "tox", "--out", tmp_path / "short", "--length", 4)
    assert long.exit_code == 2 and "--length is 4" in long.stderr and long.stderr.count("\n") == 1
    there = squash(tmp_path / "tox", "--out", tmp_path / "tox")
    assert there.exit_code == 2 and "choose another --out" in there.stderr
