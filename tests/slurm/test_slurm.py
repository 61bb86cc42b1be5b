"""Sweeps on a real SLURM: jobs of one rank and of two, and jobs that are killed, or asked to make way, in training."""

import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import ROOT, composed, overrides, same_end

from policypatch.launch import start

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="needs root and the packages slurm-wlm and munge",
    ),
]
SETTINGS = {"dpo.steps": 300, "trainer.checkpoint_every": 1, "trainer.validate_every": 100}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A SLURM of this machine, for as long as the test runs."""
    script, folder = Path(__file__).with_name("cluster.sh"), tmp_path / "slurm"
    found = subprocess.run(["bash", script, "start", folder], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    monkeypatch.setenv("SLURM_CONF", found.stdout.strip())
    yield
    subprocess.run(["scancel", "--user=root"], check=False)
    subprocess.run(["bash", script, "stop", folder], check=True)


@pytest.fixture
def sweep(cluster: None, tiny_base_folder: Path, tmp_path: Path):
    """Start `run.py -m hydra/launcher=slurm` in tmp_path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "POLICYPATCH_CACHE": str(tmp_path / "cache")}
    environment |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}

    def go(**changes) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "run.py"), "-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]
        command += overrides(tiny_base_folder, tmp_path, **(SETTINGS | changes))
        log = (tmp_path / f"{changes['name']}.log").open("w")
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)

    return go


def wait_for(what: Callable[[], object], seconds: float = 240) -> None:
    """Until it is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def job_of(sweep_folder: Path, number: int) -> str:
    """SLURM's id of a sweep's job."""
    done = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=True)
    arrays = {path.name.split("_")[0] for path in (sweep_folder / ".submitit").glob("*_*")}
    return next(job for job in done.stdout.split() if job in {f"{array}_{number}" for array in arrays})


def test_jobs_that_are_killed_or_make_way_end_as_if_nothing_had_been(
    sweep, tiny_base_folder, tmp_path: Path, monkeypatch
):
    """One array of three jobs of one rank, and beside it one job of two."""
    three = sweep(name="three", seed="0,1,2", logger="wandb")
    two = sweep(name="two", seed=3, trainer__devices=2)
    folder = tmp_path / "outputs"
    training = [folder / "three" / f"seed={seed}" / "checkpoints" / "dpo" / "last.ckpt" for seed in (1, 2)]
    wait_for(training[0].is_file)
    subprocess.run(["scontrol", "requeue", job_of(folder / "three", 1)], check=True)
    wait_for(training[1].is_file)
    subprocess.run(["scancel", "--signal=USR2", job_of(folder / "three", 2)], check=True)
    release = ["bash", "-c", "for j in $(squeue -h -r -t PD -o %i); do scontrol update job=$j StartTime=now; done"]
    wait_for(lambda: subprocess.run(release, check=False) and three.poll() is not None and two.poll() is not None)
    logs = "".join((tmp_path / f"{name}.log").read_text() for name in ("three", "two"))
    assert (three.returncode, two.returncode) == (0, 0), logs
    assert (folder / "three" / "compare.html").is_file()

    places = [*(folder / "three" / f"seed={seed}" for seed in range(3)), folder / "two" / "0"]
    assert [(place / "run.log").read_text().count("dpo resumes from") for place in places] == [0, 1, 1, 0]
    for place in places[1:3]:  # the second attempt goes on in the first one's W&B run
        runs = [path.name.split("-", 3)[-1] for path in (place / "wandb").glob("offline-run-*-dpo")]
        assert len(runs) == 2 and len(set(runs)) == 1

    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "another"))
    for seed, place in enumerate(places):
        arguments = overrides(tiny_base_folder, tmp_path, seed=seed, **SETTINGS)
        start(composed(arguments), tmp_path / "here" / str(seed), "", arguments)
        expected = tmp_path / "here" / str(seed)
        if seed < 3:
            same_end(expected, place)
        else:  # two ranks add up in another order
            assert (place / "pairs.jsonl").read_bytes() == (expected / "pairs.jsonl").read_bytes()
            first, second = (figures(of) for of in (expected, place))
            assert second == pytest.approx(first, abs=0.01)


def figures(run: Path) -> list[float]:
    """All that was logged but one: at DPO's first step policy and reference agree, and a margin's sign is chance."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    first = {row["metric"]: row for row in rows if (row["stage"], row["step"]) == ("dpo", "1")}
    assert abs(float(first["train/margin"]["value"])) < 1e-5
    return [float(row["value"]) for row in rows if row is not first["train/accuracy"]]
