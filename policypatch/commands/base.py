"""What commands share: how they are added, and the base that a command line names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from policypatch.errors import PolicyPatchError
from policypatch.home import CONF

if TYPE_CHECKING:
    from policypatch.model.base import Base
    from policypatch.patch.artifact import Patch

MODEL = "base: a folder, a GGUF file, a hub id, or a name of conf/model/"


class Register(Protocol):
    """Adds a command, under a name of its own where that is given."""

    def __call__(self, command: Callable[..., None], name: str | None = None) -> None:
        """Add it."""


def composed(overrides: list[str]) -> Any:
    """The config that run.py would get, checked.

    Raises:
        PolicyPatchError: this is no checkout, or the overrides do not compose to a config that a run could use.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from policypatch.command_line import first_line, spelt_out
    from policypatch.settings import check

    if not CONF.is_dir():
        raise PolicyPatchError(f"there is no {CONF}: this command needs a checkout, installed with pip install -e .")
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("config", overrides=spelt_out(overrides))
        check(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise PolicyPatchError(f"conf/ does not compose: {first_line(error)}") from error
    return cfg


def refuse_existing(out: Path) -> None:
    """Refuse to write over what is there."""
    if out.exists():
        raise PolicyPatchError(f"{out} exists: choose another --out")


def tell_odd_norms(patches: Sequence[Patch], base: Base) -> None:
    """Warn of patches whose vectors are far longer or shorter than the base's embeddings."""
    from policypatch.patch.artifact import far_out

    for patch in patches:
        if odd := far_out(patch.vectors, base.embedding):
            Console(soft_wrap=True, highlight=False).print(f"! {patch.manifest.name}: {odd}", markup=False)


def base_of(model: str, dtype: str = "auto") -> Any:
    """The base that a command line names.

    Raises:
        PolicyPatchError: it cannot be had or does not load.
    """
    from policypatch.logs import quiet_libraries
    from policypatch.model.load import load_base

    quiet_libraries()
    config = model_config(model)
    if dtype != "auto":  # what the base's own file says stands otherwise
        config.dtype = dtype
    return load_base(config)


def model_config(model: str) -> Any:
    """The base that a command line names, as `conf/model/` describes one."""
    from omegaconf import OmegaConf

    known = CONF / "model" / f"{model}.yaml"
    if known.is_file():
        return OmegaConf.load(known)
    options: dict[str, Any] = {"name": model, "source": None, "path": None, "dtype": "auto", "device": "auto"}
    options |= {"attention": "sdpa", "quantize": None}
    if (place := Path(model).expanduser()).exists():
        options |= {"path": model, "name": place.resolve().name}
    else:
        options["source"] = {"hub": model}
    return OmegaConf.create(options)


def base_overrides(model: str) -> list[str]:
    """The overrides for a base that a command line names."""
    if (CONF / "model" / f"{model}.yaml").is_file():
        return [f"model={model}"]
    config = model_config(model)
    source = "null" if config.source is None else f"{{hub:{quoted(config.source.hub)}}}"
    path = "null" if config.path is None else quoted(Path(config.path).expanduser().absolute())
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name)
    return [f"model.name={quoted(name)}", f"model.path={path}", f"model.source={source}", "model.dtype=auto"]


def known_risk(risks: Sequence[str]) -> str:
    """The first risk that conf/ knows."""
    found = next((risk for risk in risks if (CONF / "risk" / f"{risk}.yaml").is_file()), None)
    if found is None or found == "custom":
        raise PolicyPatchError(
            f"the patch addresses {', '.join(risks)}, which needs prompts and a judge: give --risk custom --set "
            "risk.prompts=FILE --set 'risk.judge=...' (docs/custom.md)"
        )
    return found


def risk_overrides(risks: Sequence[str]) -> list[str]:
    """The overrides for the risks that a patch was trained against, all together where conf/ knows several."""
    known = [risk for risk in risks if risk != "custom" and (CONF / "part" / f"{risk}.yaml").is_file()]
    return [f"risk=[{','.join(known)}]"] if len(known) > 1 else [f"risk={known_risk(risks)}"]


def marked_of_any(cfg: Any, ready: Any) -> dict[str, list[str]]:
    """By risk, what has a part in training against it: it is marked, and speaks only where nothing else does."""
    from policypatch.prepare import marked_of_others

    return marked_of_others(cfg) | ready.marked


def filters_of_any(cfg: Any, ready: Any) -> dict[str, list[str]]:
    """By risk, the judges that choose its training pairs."""
    others = {section.get("name", key): list(section.get("filter") or ()) for key, section in cfg.others.items()}
    return others | {part.risk.name: list(part.teacher.filter_judges) for part in ready.parts}


def evaluate_settings(cfg: Any) -> Any:
    """How much was measured, for a manifest: `policypatch audit` measures as much again."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg.evaluate, resolve=True)


def quoted(value: object) -> str:
    """As Hydra's command line takes any text."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def stack_overrides(folders: Sequence[Path]) -> list[str]:
    """The overrides for patches that are there; they refuse those of another base, and a stack that does not fit."""
    return ["method=stack", f"method.patches=[{','.join(quoted(folder.absolute()) for folder in folders)}]"]
