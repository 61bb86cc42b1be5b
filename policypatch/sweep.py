"""A sweep: a job that fails does not end it, and at its end everything stands side by side."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from policypatch.errors import ForeignFolder, PolicyPatchError
from policypatch.files.atomic import write_json, write_text
from policypatch.report.records import FAILED, REFUSED

log = logging.getLogger(__name__)

LIST = "POLICYPATCH_SWEEP"
"""Environment variable, which the jobs' processes inherit: a file with a line for the folder of every job."""


def job(
    cfg: DictConfig, folder: Path, overrides: str, arguments: list[str], log_config: Any = None, at_once: int = 1
) -> None:
    """One job of a sweep: as `policypatch.launch.start`, but what goes wrong is written down and ends this job alone.

    Hydra would go on as well, but forget to finish the sweep: it raises the first failure at its end.

    Args:
        cfg, folder, overrides, arguments, log_config: see there.
        at_once: jobs that the launcher runs at the same time on this machine, which share its cores; -1 one for each.
    """
    import torch

    from policypatch.launch import start

    folder.mkdir(parents=True, exist_ok=True)
    if "SUBMITIT_EXECUTOR" in os.environ:  # which waits for SIGKILL, while what the job depends on has ended already
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if listed := os.environ.get(LIST):
        with Path(listed).open("a", encoding="utf-8") as f:
            f.write(f"{folder.resolve()}\n")
    threads = torch.get_num_threads()
    try:
        if at_once != 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(min(threads, max(1, cores // (at_once if at_once > 0 else cores))))
        start(cfg, folder, overrides, arguments, log_config)
    except Exception as error:
        known = isinstance(error, PolicyPatchError)  # one sentence says it all; anything else needs its traceback
        log.error("%s failed: %s", overrides or folder.name, error, exc_info=None if known else error)
        # The run that stands in the folder may be another one, and as good as it was.
        note_failure(folder / (REFUSED if isinstance(error, ForeignFolder) else FAILED), error)
    finally:
        torch.set_num_threads(threads)
        gc.collect()  # a trainer and its module hold each other, and with them the base
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def note_failure(path: Path, error: Exception) -> None:
    """Write down what a run failed of, for the comparison; that it failed is told without."""
    note = {"error": type(error).__name__, "message": str(error)}
    note |= {} if isinstance(error, PolicyPatchError) else {"traceback": "".join(traceback.format_exception(error))}
    try:
        write_json(path, note)
    except OSError as full:
        log.error("%s cannot be written: %s", path, full.strerror)


def compare_what_is_left() -> None:
    """Compare the jobs of a sweep that ended before its end, as where a job's process was killed; nothing otherwise."""
    if (listed := os.environ.get(LIST)) and Path(listed).stat().st_size:
        CompareAtEnd().compare(Path(listed).parent)


class CompareAtEnd(Callback):
    """Hydra's callback that writes `compare.html`, `.csv` and `.md` into a sweep's folder once its jobs are done.

    The process then ends with exit status 1 if any of them failed.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin the list of jobs: what else lies in the folder is none of them."""
        path = (Path(config.hydra.sweep.dir) / ".jobs").resolve()
        write_text(path, "")
        os.environ[LIST] = str(path)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare what there is."""
        self.compare(Path(config.hydra.sweep.dir))

    def compare(self, folder: Path) -> None:
        """The jobs of the sweep in this folder, side by side."""
        from policypatch.report.compare import compare, say

        jobs = [Path(line) for line in Path(os.environ.pop(LIST)).read_text("utf-8").splitlines()]
        try:
            comparison = compare(jobs or [folder], folder)
        except PolicyPatchError as error:
            sys.exit(f"error: {error}")
        except Exception:  # Hydra would make a warning of it, and the sweep would look well
            log.exception("the comparison failed")
            sys.exit(1)
        finally:
            for job in jobs:  # the run that stands there is another one, and as good as it was
                (job / REFUSED).unlink(missing_ok=True)
        say(comparison, folder)
        if comparison.failed:
            sys.exit(1)
