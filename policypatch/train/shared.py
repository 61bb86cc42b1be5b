"""A stage that another run of the same settings has trained is not trained again.

The runs of a sweep over what only DPO reads (beta, its reference) share their SFT, and sweeps that pass through the
same settings share both stages. What a stage leaves, its last checkpoint, its figures and what it cost, is kept in the
cache under a digest of everything it depends on.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from policypatch import ranks
from policypatch.files.atomic import atomic_path
from policypatch.files.cache import content_key, entry
from policypatch.model.backbone import PrefixBackbone
from policypatch.patch.artifact import digest
from policypatch.train.checkpoints import LAST
from policypatch.train.cost import COST
from policypatch.train.stage import read_figures, write_figures

log = logging.getLogger(__name__)

FIGURES = "metrics.csv"
CODE = {  # what a training step goes through: another version of it is another training
    "policypatch.train": None,
    "policypatch.data": ("balance.py", "datamodule.py"),
    "policypatch.model": (
        "attention.py",
        "backbone.py",
        "company.py",
        "head.py",
        "lora.py",
        "over_root.py",
        "packed.py",
        "parts.py",
        "sharded.py",
        "tree.py",
    ),
}
PACKAGES = ("torch", "transformers", "lightning", "peft")


def trained_once(
    stage: str,
    folder: Path,
    about: dict[str, Any],
    backbone: PrefixBackbone,
    train: Callable[[], object],
    loggers: Sequence[Logger] = (),
) -> None:
    """Have a stage's files in a run's folder and its tensors in the backbone, by training or from the cache.

    Args:
        stage: its name.
        folder: of the run.
        about: what the stage depends on beside the backbone's tensors and the code.
        backbone: as it is before the stage.
        train: trains it, from the stage's last checkpoint in the folder where there is one.
        loggers: which hear of figures that the cache has, as they would of a training.
    """
    known = about | {"stage": stage, "start": _state(backbone), "code": _code()}
    known |= {"versions": {name: version(name) for name in PACKAGES}}
    ours = folder / "checkpoints" / stage
    trained = False

    def build(target: Path) -> None:
        nonlocal trained
        train()
        trained = True
        for name in (LAST, COST):
            shutil.copyfile(ours / name, target / name)
        write_figures(target / FIGURES, [row for row in read_figures(folder / FIGURES) if row["stage"] == stage])

    cached = entry("stages", content_key(**known), build, about=known, together=True)
    if trained:
        return

    def take() -> None:
        if (ours / LAST).is_file() and (ours / LAST).read_bytes() == (cached / LAST).read_bytes():
            return
        log.info("%s was trained before by a run of the same settings", stage)
        ours.mkdir(parents=True, exist_ok=True)
        for name in (COST, LAST):
            with atomic_path(ours / name) as temporary:
                shutil.copyfile(cached / name, temporary)
        others = [row for row in read_figures(folder / FIGURES) if row["stage"] != stage]
        write_figures(folder / FIGURES, [*read_figures(cached / FIGURES), *others])
        _tell(read_figures(cached / FIGURES), loggers)

    ranks.once(take)
    train()  # from a checkpoint of its end: it loads that and takes no step


def _tell(rows: list[dict[str, str]], loggers: Sequence[Logger]) -> None:
    """Figures by step; Lightning counts the steps that came before a training step, and those before a validation."""
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        before = int(row["step"]) - row["metric"].startswith("train/")
        steps.setdefault(before, {})[row["metric"]] = float(row["value"])
    for logger in loggers:
        for step in sorted(steps):
            logger.log_metrics(steps[step], step=step)


def _state(backbone: PrefixBackbone) -> dict[str, str]:
    return {name: digest(value.float().reshape(1, -1)) for name, value in backbone.state_dict().items()}


def _code() -> str:
    found = hashlib.sha256()
    for package, names in CODE.items():
        for path in sorted(files(package).iterdir(), key=lambda path: path.name):
            if path.name.endswith(".py") and (names is None or path.name in names):
                found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()
