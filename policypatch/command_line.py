"""Checks of a command line, before Hydra starts the first job: unknown keys, every value of a sweep, its launcher."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policypatch import ranks
from policypatch.errors import PolicyPatchError
from policypatch.files.disk import refuse_closed
from policypatch.settings import ABSENT, check


def check_overrides(arguments: Sequence[str], multirun: bool = True) -> None:
    """Compose every value that a command line asks for, one at a time, before Hydra starts the first job.

    A sweep whose third value is impossible is refused at once, not after two trainings. Must run inside
    `hydra.initialize*`.

    Args:
        arguments: the overrides.
        multirun: whether several values of a key are a sweep.

    Raises:
        PolicyPatchError: an unknown key (with the nearest known one), an unknown choice, or what `check` or
            `check_launcher` refuses.
    """
    if multirun and ranks.one_of_several():
        raise PolicyPatchError(
            "a sweep (-m) was started in several ranks, each of which would go through all of its jobs: start it once, "
            "as a job of several trainer.devices starts its own ranks"
        )
    overrides = _parse(arguments)
    swept = [o for o in overrides if o.is_sweep_override()]
    if swept and not multirun:
        raise PolicyPatchError(f"{swept[0].key_or_group} has several values: add -m for a sweep over them")
    plain = [o.input_line or "" for o in overrides if o not in swept]
    try:
        from_files = _sweeps_of_files(overrides) if any(o.is_add() for o in overrides) else []
        if from_files and not multirun:
            raise PolicyPatchError(f"{from_files[0].key_or_group} is swept by the experiment: add -m")
        overrides, swept = [*overrides, *from_files], [*swept, *from_files]
        chosen = [o.input_line or "" for o in overrides if o not in swept and (o.is_add() or _is_choice(o))]
        known = compose("config", overrides=chosen)
        for override in overrides:
            _check_key(override, known, {o.key_or_group for o in swept})
        # One for all jobs.
        launcher = compose("config", overrides=plain, return_hydra_config=True).hydra.launcher if multirun else None
        for extra in _single_values(swept):
            cfg = compose("config", overrides=[*plain, *extra])
            check(cfg)
            if launcher is not None:
                check_launcher(cfg.trainer, launcher)
    except (HydraException, OmegaConfBaseException) as error:
        raise PolicyPatchError(first_line(error)) from error
    except yaml.YAMLError as error:
        raise PolicyPatchError(f"a file of conf/ is not valid YAML: {' '.join(str(error).split())}") from error


def check_folder(arguments: Sequence[str], multirun: bool) -> None:
    """Refuse a folder of runs that cannot be written, which Hydra would tell with a traceback. Within `initialize*`.

    Args:
        arguments: the overrides, known to compose.
        multirun: whether they are a sweep.
    """
    plain = [override.input_line or "" for override in _parse(arguments) if not override.is_sweep_override()]
    kind = "sweep" if multirun else "run"
    folder = compose("config", overrides=plain, return_hydra_config=True).hydra[kind].dir
    refuse_closed(Path(folder).absolute(), f"hydra.{kind}.dir")


def _sweeps_of_files(overrides: Sequence[Override]) -> list[Override]:
    """What an experiment sweeps (`hydra.sweeper.params`); a key that the command line has, too, is that one's."""
    chosen = [o for o in overrides if not o.is_sweep_override() and (o.is_add() or _is_choice(o))]
    hydra_cfg = compose("config", overrides=[o.input_line or "" for o in chosen], return_hydra_config=True).hydra
    params = OmegaConf.to_container(hydra_cfg.sweeper.get("params") or OmegaConf.create({}))
    assert isinstance(params, dict)
    found = _parse([f"{key!s}={value!s}" for key, value in params.items()])
    given = {o.key_or_group for o in overrides}
    return [o for o in found if o.key_or_group not in given]


def spelt_out(arguments: Sequence[str]) -> list[str]:
    """A command line with `risk=[A,B]` as Hydra takes it: the joint risk, and which parts it has."""
    found: list[str] = []
    for argument in arguments:
        match = re.fullmatch(r"risk=(\[[^\[\]]+\])", argument)
        found += ["risk=joint", f"part@risk.parts={match[1]}"] if match else [argument]
    return found


KNOWN_LAUNCHERS = ("BasicLauncher", "JoblibLauncher", "SlurmLauncher")
FIXED_IN_NAME = 100  # bytes that the values all jobs share may take of a folder's name, which may have 255


def left_out_of_names(arguments: Sequence[str]) -> list[str]:
    """Keys that a sweep's folder names must do without: those of conf/config.yaml, and troublesome fixed ones.

    What all jobs share tells none apart: it goes where it would make folders within folders (a path), and all of it
    where names would grow too long. Must run inside `hydra.initialize*`.
    """
    hydra_cfg = compose("config", return_hydra_config=True).hydra
    fixed = {o.key_or_group: o.input_line or "" for o in _parse(arguments) if not o.is_sweep_override()}
    out = list(hydra_cfg.job.config.override_dirname.exclude_keys)
    out += ["experiment"] if "experiment" in fixed else []  # it has given the sweep its folder
    shown = {key: line for key, line in fixed.items() if key not in out and "/" not in line}
    too_long = sum(len(line.encode()) + 1 for line in shown.values()) > FIXED_IN_NAME
    return [*out, *(key for key in fixed if key not in out and (too_long or key not in shown))]


def has_no_name(arguments: Sequence[str], left_out: Collection[str]) -> bool:
    """Whether nothing is left to call a sweep's only job by, so that it would take the sweep's own folder.

    Jobs of later sweeps below it would not be found then, as a run's folder holds no other run.

    Args:
        arguments: the overrides.
        left_out: keys that names do without (`left_out_of_names`).
    """
    overrides = _parse(arguments)
    others = [o.key_or_group for o in overrides if o.key_or_group not in left_out]
    named = [key for key in others if key == "hydra.sweep.subdir" or not re.match(r"hydra[./]", key)]
    return not named and not _sweeps_of_files(overrides)


def _parse(arguments: Sequence[str]) -> list[Override]:
    try:
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        return parser.parse_overrides(list(arguments))
    except HydraException as error:
        raise PolicyPatchError(f"the command line cannot be read: {first_line(error)}") from error


def _single_values(swept: Sequence[Override]) -> Iterator[list[str]]:
    """The first combination of a sweep, then every other value of each swept key with the rest at its first."""
    if any(not o.is_discrete_sweep() for o in swept):
        yield []
        return
    values = [[f"{o.get_key_element()}={v!s}" for v in o.sweep_string_iterator()] for o in swept]
    first = [v[0] for v in values]
    yield first
    for i, options in enumerate(values):
        for option in options[1:]:
            yield [*first[:i], option, *first[i + 1 :]]


def _is_choice(override: Override) -> bool:
    """Whether it chooses an option of a config group, which decides what keys there are."""
    return bool(GlobalHydra.instance().config_loader().get_group_options(override.key_or_group))


def _check_key(override: Override, known: DictConfig, swept: Collection[str]) -> None:
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or override.is_delete() or key.startswith("hydra"):
        return
    names = list(_keys(known))  # with those that have no value yet, which select would not find
    if _is_choice(override) or key in names or OmegaConf.select(known, key, default=ABSENT) is not ABSENT:
        return
    if key.split(".")[0] in swept:  # another choice of the group may have the key: composing will tell
        return
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]}?" if near else ": see conf/config.yaml for the keys there are"
    raise PolicyPatchError(f"there is no key {key}{hint}")


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, cfg):
        yield f"{prefix}{name}"
        node = None if OmegaConf.is_missing(cfg, name) else cfg._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _keys(node, f"{prefix}{name}.")


def first_line(error: Exception) -> str:
    """Hydra's message in one sentence: what it says, and the options it lists."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if match := re.match(r"Could not override '([^']*)'", lines[0] if lines else ""):
        return f"there is no key {match[1]}" + ("" if len(lines) < 2 else f" ({lines[1]})")
    if "Available options in" in str(error):
        start = next(i for i, line in enumerate(lines) if line.startswith("Available options in"))
        end = next((i for i, line in enumerate(lines) if line.startswith("Config search path")), len(lines))
        return f"{lines[0]} (there is {', '.join(lines[start + 1 : end])})"
    return lines[0] if lines else type(error).__name__


def check_launcher(trainer: DictConfig, launcher: DictConfig) -> None:
    """Refuse a launcher that would not start every rank of a sweep's job, or jobs at once that want the same devices.

    Args:
        trainer: of the job.
        launcher: Hydra's, of the sweep.
    """
    devices, nodes = trainer.devices, trainer.num_nodes
    kind = str(launcher.get("_target_", "")).rpartition(".")[2]
    if (devices != 1 or nodes > 1) and kind not in KNOWN_LAUNCHERS:
        raise PolicyPatchError(
            f"hydra/launcher's {kind} is not known to start every rank of a job: leave it out, so that jobs run one "
            "after another, or use hydra/launcher=slurm"
        )
    if "tasks_per_node" in launcher:
        if devices == "all":
            raise PolicyPatchError("trainer.devices=all is known on this machine alone: say how many a job has on each")
        for key, wanted in (("tasks_per_node", devices), ("nodes", nodes)):
            if launcher[key] != wanted:
                raise PolicyPatchError(
                    f"hydra.launcher.{key} is {launcher[key]} and a job has {wanted}: use hydra/launcher=slurm, which "
                    "starts every rank, and give jobs of another size a sweep of their own"
                )
    elif nodes > 1:
        raise PolicyPatchError(
            f"trainer.num_nodes is {nodes} and this launcher starts nothing on other machines: use hydra/launcher=slurm"
        )
    elif "n_jobs" in launcher and devices != 1:
        raise PolicyPatchError(
            f"hydra/launcher=joblib runs jobs at once, each of which wants {devices} devices: leave it out, which runs "
            "them one after another, or use hydra/launcher=slurm"
        )
