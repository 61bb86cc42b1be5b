"""A run in this process, or in as many as its trainer has devices: those that a launcher has started, or our own.

Lightning would start further ranks by running the command line again, a sweep included: ours are there before.
"""

from __future__ import annotations

import logging
import logging.config
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from policypatch import pipeline, ranks
from policypatch.errors import PolicyPatchError
from policypatch.files.cache import share_occasion
from policypatch.files.disk import told
from policypatch.settings import check

log = logging.getLogger(__name__)


def start(
    cfg: DictConfig,
    folder: Path,
    overrides: str,
    arguments: list[str],
    log_config: Mapping[str, Any] | None = None,
) -> None:
    """Run, as `policypatch.pipeline.run` does, in every rank.

    Args:
        cfg, folder, overrides, arguments: see there.
        log_config: as `logging.config.dictConfig` takes it, for ranks that are started here.

    Raises:
        PolicyPatchError: what `run` says, or what is wrong with the number of ranks.
    """
    check(cfg)
    wanted = devices(cfg) * cfg.trainer.num_nodes
    found = ranks.environment()
    if found is not None and found.world_size() != wanted:
        raise PolicyPatchError(
            f"{found.world_size()} ranks were started and the trainer has {wanted} devices: set trainer.devices to the "
            "ranks of a machine and trainer.num_nodes to the machines"
        )
    if found is not None or wanted == 1:
        ranks.join(found, cfg.trainer.accelerator == "gpu")
        folder = ranks.gather(folder)[0]  # torchrun's ranks name theirs by the time, each by its own
        share_occasion()
        with told(folder, f"started again in that folder (hydra.run.dir={folder}, or the same sweep) it goes on"):
            pipeline.run(cfg, folder, overrides, arguments)
        ranks.leave()
    elif cfg.trainer.num_nodes > 1:
        raise PolicyPatchError(
            f"trainer.num_nodes is {cfg.trainer.num_nodes} and nothing has started ranks on these machines: use "
            "hydra/launcher=slurm with -m, or torchrun"
        )
    else:
        _start_ranks(wanted, (cfg, folder, overrides, arguments, log_config))


def devices(cfg: DictConfig) -> int:
    """On each machine."""
    if cfg.trainer.devices == "all":
        return max(1, torch.cuda.device_count())
    return int(cfg.trainer.devices)


def _start_ranks(count: int, task: tuple[Any, ...]) -> None:
    """Start ranks on this machine, and stop all of them when one fails or this process is told to stop."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torchelastic-events-null"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what a rank says is what went wrong
    config = LaunchConfig(
        1, 1, count, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    cfg, *rest = task
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    log.info("starting %d ranks", count)
    try:
        elastic_launch(config, _run_as_rank)(plain, *rest)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        told = failure.message if isinstance(failure.message, str) else failure.message["message"]
        kind, _, sentence = told.partition(": ")
        kinds: list[type[PolicyPatchError]] = [PolicyPatchError, *PolicyPatchError.__subclasses__()]
        if kind in {one.__name__ for one in kinds}:
            raise PolicyPatchError(sentence) from None
        raise RuntimeError(f"rank {number} failed: {told}") from None


def _run_as_rank(
    cfg: dict[str, Any], folder: Path, overrides: str, arguments: list[str], log_config: Mapping[str, Any] | None
) -> None:
    """What a rank of ours does, with its share of the cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    if log_config is not None:
        logging.config.dictConfig(dict(log_config))
    start(OmegaConf.create(cfg), folder, overrides, arguments)
