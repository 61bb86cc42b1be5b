"""A run of two ranks on one machine comes to what a run of one comes to."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import HashJudge, broken_off, composed, overrides, without_costs

from policypatch import ranks
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import Scorecard
from policypatch.launch import start
from policypatch.methods import PatchMethod
from policypatch.model.backbone import PrefixBackbone

RUN = Path(__file__).parents[1] / "run.py"


@pytest.fixture
def go(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run in a folder below tmp_path with a cache of its own."""

    def go(name: str, devices: int, risk: str = "harmfulness", **changes) -> Path:
        monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / f"cache of {name}"))
        arguments = overrides(tiny_base_folder, tmp_path, risk, trainer__devices=devices, **changes)
        start(composed(arguments), tmp_path / name, "", arguments)
        return tmp_path / name

    return go


def figures(folder: Path) -> dict[tuple[str, ...], float]:
    with (folder / "metrics.csv").open() as f:
        return {(row["stage"], row["step"], row["metric"]): float(row["value"]) for row in csv.DictReader(f)}


@pytest.mark.parametrize("shared_out", [False, True], ids=["a base each", "one base"])
def test_two_ranks_come_to_what_one_comes_to(shared_out: bool, go):
    """Batches of an odd number of rows, benign ones and texts beside, some of which only one rank has."""
    changes = {"sft.batch_size": 5, "dpo.batch_size": 5, "kl.weight": 0.3, "texts.rows": 1, "dpo.reference": "teacher"}
    one = go("one", 1, others="all", **changes)
    two = go("two", 2, others="all", trainer__shard=shared_out, **changes)
    assert (one / "pairs.jsonl").read_bytes() == (two / "pairs.jsonl").read_bytes()
    expected, found = figures(one), figures(two)
    assert found.keys() == expected.keys()
    assert any(metric == "train/kl_texts" for _, _, metric in found)
    assert any(metric == "val/loss" for _, _, metric in found)
    assert found == pytest.approx(expected, abs=1e-5)
    cards = [without_costs(Scorecard.load(folder / "scorecard.json")) for folder in (one, two)]
    assert [(row.arm, row.split, row.metric, row.n) for row in cards[0]] == [
        (row.arm, row.split, row.metric, row.n) for row in cards[1]
    ]
    base = [[row for row in card if row.arm == "base"] for card in cards]
    assert [row.value for row in base[0]] == pytest.approx([row.value for row in base[1]], rel=1e-6)
    records = [json.loads((folder / "run.json").read_text()) for folder in (one, two)]
    assert records[0]["cache"] == records[1]["cache"]
    assert records[0]["pairs"] == records[1]["pairs"]
    assert not list(two.rglob(".tmp-*"))


def test_a_run_that_one_process_has_begun_is_taken_up_by_two(go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = figures(go("whole", 1))
    broken_off(lambda name: go(name, 1), "run", monkeypatch)
    assert figures(go("run", 2)) == pytest.approx(expected, abs=1e-5)


class FailsOnItsShare(HashJudge):
    """Finds one text that it cannot score, which only one rank has."""

    def _score_batch(self, texts: list[str]) -> np.ndarray:
        known = super()._score_batch(texts)
        return np.where([len(texts) > 1 and text == sorted(texts)[0] for text in texts], np.nan, known)


def test_what_one_rank_cannot_do_ends_the_run_on_all_in_one_sentence(go, tmp_path: Path):
    judge = "{_target_:test_several_ranks.FailsOnItsShare,name:strict}"
    with pytest.raises(PolicyPatchError, match=r"judge strict: completion .* scored nan.*, row \d+\)") as caught:
        go("run", 2, "toxicity", **{"+risk.judges.strict": judge})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "samples.jsonl").exists()  # what was measured before is there


class NoNumbers(PrefixBackbone):
    """Reads NaN on the second rank alone."""

    def completion_logprobs(self, tree):
        return super().completion_logprobs(tree) * (torch.nan if ranks.rank() == 1 else 1)


class BreaksOnOneRank(PatchMethod):
    """Trains such a backbone."""

    def start(self, base, seed, row_tokens):
        return NoNumbers(base.model, self.vectors(base, seed), row_tokens)


def test_a_loss_that_is_not_finite_on_one_rank_is_told_with_the_whole_batch(go, tmp_path: Path):
    with pytest.raises(PolicyPatchError, match=r"the sft loss became nan at step 0: .*not_finite\.json") as caught:
        go("run", 2, "toxicity", method___target_="test_several_ranks.BreaksOnOneRank")
    assert "\n" not in str(caught.value)
    told = json.loads((tmp_path / "run" / "checkpoints" / "sft" / "not_finite.json").read_text())
    assert told["step"] == 0 and len(told["lines_of_pairs"]) == 4


def test_what_is_no_fault_of_the_user_is_told_with_its_rank(go):
    with pytest.raises(RuntimeError, match=r"rank \d failed: ZeroDivisionError"):
        go("run", 2, "toxicity", method___target_="test_several_ranks.Broken")


class Broken(PatchMethod):
    """Has a mistake in its code."""

    def start(self, base, seed, row_tokens):
        return 1 / 0


@pytest.mark.parametrize(("variables", "found"), [({"SLURM_STEP_ID": "0"}, True), ({}, False)], ids=["srun", "sbatch"])
def test_a_batch_script_is_no_rank(variables: dict[str, str], found: bool, monkeypatch):
    """It has a rank and a number of tasks, too; only srun has started them."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    given = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    for name, value in (given | variables).items():
        monkeypatch.setenv(name, value)
    assert (ranks.environment() is not None) == found


def test_ranks_of_torchrun_share_the_first_ones_folder(tiny_base_folder: Path, tmp_path: Path):
    arguments = overrides(tiny_base_folder, tmp_path, "toxicity", trainer__devices=2)
    late = "hydra.run.dir=outputs/${oc.env:RANK}"  # as if the second had begun a second later
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(RUN)]
    done = subprocess.run(
        [*command, *arguments, late],
        cwd=tmp_path,
        env={**os.environ, "POLICYPATCH_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "outputs" / "0" / "patch" / "patch.safetensors").exists()
    assert not list((tmp_path / "outputs" / "1").rglob("*.safetensors"))


def test_a_sweep_that_every_rank_would_go_through_is_refused(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(RUN), "-m", "seed=0,1"],
        cwd=tmp_path,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "start it once" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 24])
def test_every_row_is_one_ranks_and_no_share_is_larger_by_more_than_one(size: int, rows: int, monkeypatch):
    shares = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "_place", ranks._Place(rank, size))
        shares.append(ranks.share(rows))
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
