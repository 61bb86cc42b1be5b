"""A run that is killed at any moment, and started again, ends as if nothing had been.

POLICYPATCH_KILLS=100 pytest -m slow tests/test_kills.py     as many as a figure is to rest on
"""

import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tiny_run import composed, overrides, same_end

from policypatch.data.datamodule import PairData
from policypatch.launch import start

log = logging.getLogger(__name__)

PARTS = ("pairs", "sft", "dpo", "evaluate", "package")  # of a run, each of which as many kills are meant for
KILLS = int(os.environ.get("POLICYPATCH_KILLS", "8"))
SETTINGS = {"trainer.checkpoint_every": 1, "sft.steps": 12, "dpo.steps": 24, "others": "all", "decode_rows": 8}


def attempt(arguments: list[str], folder: Path, cache: Path) -> None:
    """What a process of its own does; what it says lies beside its folder."""
    logging.basicConfig(filename=folder.with_suffix(".log"), level=logging.INFO, force=True)
    os.environ["POLICYPATCH_CACHE"] = str(cache)
    torch.set_num_threads(1)
    start(composed(arguments), folder, "", arguments)


def attempt_told_to_stop(arguments: list[str], folder: Path, cache: Path) -> None:
    """The same, and SIGTERM comes while Lightning has its own handler in place: when it sets up the data of a stage."""
    loader = PairData.train_dataloader

    def told(data: PairData):
        signal.raise_signal(signal.SIGTERM)
        return loader(data)

    PairData.train_dataloader = told
    attempt(arguments, folder, cache)


@pytest.fixture(scope="module")
def processes():
    """Processes begin with everything imported and nothing computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["policypatch.launch", "policypatch.methods", "tiny_run"])
    return context


def stage_of(path: Path) -> str:
    """What the run was at when it wrote the last line of its log."""
    stages = re.findall(r"progress:(\w+) \.\.\.", path.read_text()) if path.exists() else []
    return stages[-1] if stages else "start"


@pytest.mark.parametrize("trained", [False, True], ids=["from_its_beginning", "from_another_runs_end"])
def test_a_signal_while_lightning_starts_is_not_lost(trained: bool, processes, tiny_base_folder: Path, tmp_path: Path):
    """Also where the stage has no step to take."""
    arguments = overrides(tiny_base_folder, tmp_path)
    tasks = [(attempt, "first", 0)] if trained else []
    for task, name, expected in [*tasks, (attempt_told_to_stop, "run", -signal.SIGTERM)]:
        process = processes.Process(target=task, args=(arguments, tmp_path / name, tmp_path / "cache"))
        process.start()
        process.join()
        assert process.exitcode == expected


@pytest.mark.slow
@pytest.mark.timeout(60 + 60 * KILLS)
def test_a_killed_run_ends_as_if_nothing_had_been(processes, tiny_base_folder: Path, tmp_path: Path):
    draw = random.Random(os.environ.get("POLICYPATCH_KILLS_SEED", "0"))
    arguments = overrides(tiny_base_folder, tmp_path, **SETTINGS)

    def begin(name: str) -> BaseProcess:
        process = processes.Process(target=attempt, args=(arguments, tmp_path / name, tmp_path / f"cache of {name}"))
        process.start()
        return process

    def whole(name: str) -> float:
        began = time.monotonic()
        process = begin(name)
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - began

    whole("warm")  # the first one waits for the imports
    seconds = whole("undisturbed")
    spent = json.loads((tmp_path / "undisturbed" / "run.json").read_text())["seconds"]
    told = []
    for number in range(KILLS):
        name, part = f"run {number}", PARTS[number % len(PARTS)]
        when = draw.uniform(0, spent[part])  # after it has begun
        how = draw.choice([signal.SIGKILL, signal.SIGTERM])
        process = begin(name)
        while process.is_alive() and stage_of(tmp_path / f"{name}.log") != part:
            time.sleep(0.002)
        process.join(when)
        during = stage_of(tmp_path / f"{name}.log")
        if process.is_alive():
            os.kill(process.pid, how)
            process.join()
            assert process.exitcode == -how
        else:
            during = "after"
        told.append({"into": part, "after": round(when, 2), "by": how.name, "during": during})
        whole(name)
        same_end(tmp_path / "undisturbed", tmp_path / name)
        assert not list((tmp_path / f"cache of {name}").rglob(".begun-*"))
        shutil.rmtree(tmp_path / f"cache of {name}")
    log.info(json.dumps({"kills": KILLS, "seconds": round(seconds, 1), "each": told}))
