"""A sweep: a job that fails does not end it, and at its end everything stands side by side."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import write_json
from policypatch.report.records import FAILED

log = logging.getLogger(__name__)


def job(cfg: DictConfig, folder: Path, overrides: str, arguments: list[str], at_once: int = 1) -> None:
    """One job of a sweep: as `policypatch.pipeline.run`, but what goes wrong is written down and ends this job alone.

    Hydra would go on as well, but forget to finish the sweep: it raises the first failure at its end.

    Args:
        cfg, folder, overrides, arguments: see there.
        at_once: jobs that the launcher runs at the same time on this machine, which share its cores.
    """
    import torch

    from policypatch.pipeline import run

    try:
        if at_once != 1 and cfg.trainer.threads is None:
            cores = torch.get_num_threads()
            torch.set_num_threads(max(1, cores // (at_once if at_once > 0 else cores)))
        run(cfg, folder, overrides, arguments)
    except Exception as error:
        known = isinstance(
            error, PolicyPatchError
        )  # says in one sentence what to do; anything else needs its traceback
        log.error("%s failed: %s", overrides or folder.name, error, exc_info=None if known else error)
        note = {"error": type(error).__name__, "message": str(error)}
        write_json(folder / FAILED, note if known else note | {"traceback": traceback.format_exc()})


class Comparison(Callback):
    """Hydra's callback that writes `compare.html`, `.csv` and `.md` into a sweep's folder once its jobs are done.

    The process then ends with exit status 1 if any of them failed.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare what there is."""
        from policypatch.report.compare import compare

        folder = Path(config.hydra.sweep.dir)
        try:
            comparison = compare([folder], folder)
        except PolicyPatchError as error:
            sys.exit(f"error: {error}")
        Console(soft_wrap=True).print(comparison.summary(), markup=False, highlight=False)
        if comparison.failed:
            sys.exit(1)
