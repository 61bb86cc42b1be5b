"""`python run.py`, for real: a sweep that makes its pairs once, and mistakes that end in one sentence."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_run import ROOT, overrides

from policypatch.evaluate.scorecard import Scorecard
from policypatch.report.records import find_records
from policypatch.sweep import LIST, compare_what_is_left

COUNTED = ("pairs", "reference", "completions", "judgements")
NOTHING = {"hits": 0, "misses": 0}


@pytest.fixture
def cli(tiny_base_folder: Path, tmp_path: Path):
    """Run the command in an empty folder of its own; only the outputs' place differs from what a user has."""

    def call(*arguments: str, sweep: bool = False, **changes) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "run.py"), *(["-m"] if sweep else []), *arguments]
        command += overrides(tiny_base_folder, tmp_path, **{"name": "tiny", **changes})
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "POLICYPATCH_CACHE": str(tmp_path / "cache")}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)

    return call


def is_one_sentence(done: subprocess.CompletedProcess, folder: Path, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(folder.rglob("*.ckpt"))


def test_a_misspelt_key_ends_in_one_sentence(cli, tmp_path: Path):
    done = cli("patch.lenght=3")
    is_one_sentence(done, tmp_path, "patch.lenght", "did you mean patch.length?")
    assert done.stderr.count("\n") == 1  # nothing else was started
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_with_one_impossible_value_does_not_start(cli, tmp_path: Path):
    done = cli(sweep=True, **{"patch.length": "2,3,0"})
    is_one_sentence(done, tmp_path, "patch.length is 0")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_what_only_the_base_can_tell_ends_in_one_sentence(cli, tmp_path: Path):
    is_one_sentence(cli(**{"patch.length": 500}), tmp_path, "patch.length is 500", "context", "512")


def test_a_missing_file_ends_in_one_sentence(cli, tmp_path: Path):
    is_one_sentence(cli(**{"model.path": "/nope"}), tmp_path, "model.path", "/nope")
    (note,) = tmp_path.rglob("failed.json")  # for `policypatch compare`
    assert "/nope" in json.loads(note.read_text())["message"]


@pytest.mark.slow
@pytest.mark.parametrize(("reference", "made_once_for"), [("base", 1), ("sft", 3)])
def test_a_sweep_of_six_makes_its_pairs_once(cli, tmp_path: Path, reference: str, made_once_for: int):
    """The base's reference is everyone's; one after SFT, as by default, differs by length and not by beta."""
    about = {"init": "vocab", "dpo.reference": reference}
    done = cli(sweep=True, **{"patch.length": "2,3,4", "dpo.beta": "0.1,0.5"}, **about)
    assert done.returncode == 0, done.stderr[-3000:]
    folders = sorted(path.parent for path in (tmp_path / "outputs" / "tiny").rglob("scorecard.json"))
    assert len(folders) == 6
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    made = [record["cache"]["pairs"]["misses"] for record in records]
    assert sorted(made) == [0, 0, 0, 0, 0, 1]
    seen = set()
    for folder in folders:
        manifest = json.loads((folder / "patch" / "patch.json").read_text())
        seen.add((manifest["length"], manifest["training"]["dpo"]["beta"]))
        assert f"dpo.beta={manifest['training']['dpo']['beta']}" in folder.name
        assert f"patch.length={manifest['length']}" in folder.name
        assert (folder / "report.html").is_file()
    assert seen == {(length, beta) for length in (2, 3, 4) for beta in (0.1, 0.5)}
    # All six are compared with one and the same base.
    bases = [[row for row in Scorecard.load(folder / "scorecard.json") if row.arm == "base"] for folder in folders]
    assert all(base == bases[0] for base in bases)

    # Made once: the base's samples and judgements, and for whom they are the same the reference's log-probabilities.
    made = {kind: sum(record["cache"].get(kind, NOTHING)["misses"] for record in records) for kind in COUNTED}
    assert made["reference"] == made_once_for
    assert made["completions"] == 1 + 1 + 3 + 6  # pairs, base, sft of each length, patch of each run
    assert made["judgements"] == 1 + 2 * (1 + 1 + 3 + 6)  # pairs by the filter; prompts and samples by two judges
    comparison = tmp_path / "outputs" / "tiny"
    assert {f"compare.{kind}" for kind in ("html", "csv", "md")} <= {path.name for path in comparison.iterdir()}
    assert "6 of 6 runs finished" in done.stdout and "pairs 1 made 5 found" in done.stdout
    assert "| patch | 0.1 | 2 |" in (comparison / "compare.md").read_text()


@pytest.mark.slow
def test_a_sweep_of_one_leaves_its_folder_to_others(cli, tmp_path: Path):
    long = {f"{stage}.{key}": "0.10000000" for stage in ("sft", "dpo") for key in ("warmup", "weight_decay", "clip")}
    assert cli(sweep=True, **long).returncode == 0
    done = cli(sweep=True, seed="0,1", **long)
    assert done.returncode == 0, done.stderr[-3000:]
    found = find_records([tmp_path / "outputs" / "tiny"])
    assert [record.folder.name for record in found] == ["0", "seed=0", "seed=1"]


@pytest.mark.slow
def test_a_job_that_fails_does_not_end_the_sweep_and_is_seen(cli, tmp_path: Path):
    done = cli(sweep=True, **{"patch.length": "500,2", "name": "broken"})
    assert done.returncode == 1
    folder = tmp_path / "outputs" / "broken"
    note = json.loads((folder / "patch.length=500" / "failed.json").read_text())
    assert note["error"] == "PolicyPatchError" and "patch.length is 500" in note["message"]
    assert (folder / "patch.length=2" / "report.html").is_file()
    assert "failed: patch.length=500: patch.length is 500" in done.stdout and "Traceback" not in done.stderr
    assert "patch.length is 500" in (folder / "compare.html").read_text()


def test_a_sweep_whose_launcher_was_killed_is_compared_as_far_as_it_came(tmp_path: Path, monkeypatch, capsys):
    jobs = [tmp_path / "done", tmp_path / "killed"]
    for number, job in enumerate(jobs):
        job.mkdir()
        (job / "config.yaml").write_text(f"patch: {{length: {number}}}")
    (jobs[0] / "scorecard.json").write_text("[]")
    (jobs[0] / "run.json").write_text("{}")
    (tmp_path / ".jobs").write_text("".join(f"{job}\n" for job in jobs))
    monkeypatch.setenv(LIST, str(tmp_path / ".jobs"))
    with pytest.raises(SystemExit):
        compare_what_is_left()
    assert "1 of 2 runs finished" in capsys.readouterr().out and (tmp_path / "compare.html").is_file()
    assert LIST not in os.environ
    compare_what_is_left()  # nothing is left


@pytest.mark.slow
def test_a_sweep_into_a_folder_of_another_leaves_that_ones_runs_as_they_were(cli, tmp_path: Path):
    """What else lies in the folder is no job of the sweep, and counts neither as failed nor at all."""
    stray = tmp_path / "outputs" / "again" / "stray"
    stray.mkdir(parents=True)
    (stray / "config.yaml").write_text("seed: 7\n")
    first = cli(sweep=True, **{"patch.length": "2,3", "name": "again"})
    assert first.returncode == 0 and "2 of 2 runs finished" in first.stdout, first.stdout
    second = cli(sweep=True, **{"patch.length": "2,4", "name": "again", "data.max_completion_tokens": 15})
    # The folders are named by what is swept, so that of length 2 holds the other configuration's run.
    names = {path.name for path in (tmp_path / "outputs" / "again").iterdir() if path.is_dir()}
    if "patch.length=2" in names:
        assert second.returncode == 1 and "failed: patch.length=2: refused: " in second.stdout, second.stdout
        assert not list((tmp_path / "outputs" / "again" / "patch.length=2").glob("*.json.*"))
        assert not (tmp_path / "outputs" / "again" / "patch.length=2" / "failed.json").exists()


@pytest.mark.slow
def test_a_job_of_joblibs_that_is_killed_is_seen(cli, tmp_path: Path):
    """As by a system that is out of memory; the other process' job may or may not come to its end."""

    def kill() -> None:
        folder = tmp_path / "outputs" / "killed"
        while not list(folder.rglob("pairs.jsonl")):
            time.sleep(0.1)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words, its = (process / "cmdline").read_text(), (process / "environ").read_text()
            except OSError:  # gone, or not ours
                continue
            if "popen_loky" in words and str(folder) in its:
                os.kill(int(process.name), signal.SIGKILL)
                return

    threading.Thread(target=kill, daemon=True).start()
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    done = cli(*joblib, sweep=True, **{"patch.length": "2,3,4,5", "name": "killed", "sft.steps": 30})
    assert done.returncode == 1 and "did not finish" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "outputs" / "killed" / "compare.html").is_file()


@pytest.mark.slow
def test_joblib_runs_jobs_at_once_and_shares_the_cores_among_them(cli, tmp_path: Path):
    """Two at once: each computes with half of the threads, one of the two makes the pairs, and one may fail."""
    import torch

    done = cli(
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", sweep=True, **{"patch.length": "2,3,500", "name": "at_once"}
    )
    assert done.returncode == 1 and "2 of 3 runs finished" in done.stdout, done.stdout + done.stderr
    folders = [tmp_path / "outputs" / "at_once" / f"patch.length={length}" for length in (2, 3)]
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    assert [record["threads"] for record in records] == [max(1, torch.get_num_threads() // 2)] * 2
    assert sorted(record["cache"]["pairs"]["misses"] for record in records) == [0, 1]
    assert (folders[0].parent / "compare.html").is_file()
