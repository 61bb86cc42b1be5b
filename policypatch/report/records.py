"""Runs as they are found in folders: their settings, their scorecards, and what those that failed failed of."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import read_json

FAILED = "failed.json"
"""In the folder of a run that failed: `error`, `message` and, where nobody foresaw it, `traceback`."""
NOT_SETTINGS = ("name", "logger")  # top-level keys that change nothing in a run
ALWAYS = ("risk.name", "model.name", "method.name")  # keys that runs are told apart by wherever they differ
BESIDE = ("others.", "evaluate.after_sft", "evaluate.costs")
"""Beginnings of keys that say what else is measured, which makes no other patch and no other figure."""
UNFINISHED = "did not finish: started again in this folder (hydra.run.dir=FOLDER), it goes on where it stopped"
REFUSED = "refused.json"
"""In the folder of another configuration's run: that a job of a sweep was refused because of it."""


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        folder: where it is.
        settings: its config as flat keys, without `NOT_SETTINGS`.
        rows: of its scorecard; none where it did not finish.
        run: its `run.json`.
        given: the keys that its command, or the sweep it was a job of, set.
        error: why it has no scorecard; None where it has one.
    """

    folder: Path
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    run: Mapping[str, Any]
    error: str | None = None
    given: frozenset[str] = frozenset()

    @property
    def finished(self) -> bool:
        """Whether it has a scorecard to compare."""
        return self.error is None


def find_records(folders: Sequence[Path]) -> list[Record]:
    """The runs at or below these folders, in the order of their paths.

    Raises:
        PolicyPatchError: a folder that does not exist or holds no run, or a file that cannot be read.
    """
    found: dict[Path, Record] = {}
    for folder in folders:
        if not folder.is_dir():
            raise PolicyPatchError(f"{folder} does not exist: give the folder of a sweep or of runs")
        here = {run.resolve(): read_record(run) for run in sorted(_run_folders(folder))}
        if not here:
            raise PolicyPatchError(
                f"{folder} holds no run: give the folder of a sweep or of runs, such as outputs/demo"
            )
        found |= here
    return list(found.values())


def _run_folders(folder: Path) -> Iterator[Path]:
    if any((folder / name).is_file() for name in ("config.yaml", FAILED, ".hydra/config.yaml")):
        yield folder
        return
    for below in sorted(folder.iterdir()):
        if below.is_dir() and not below.name.startswith("."):  # .hydra has a config.yaml, too
            yield from _run_folders(below)


def read_record(folder: Path) -> Record:
    """One run's folder."""
    settings, given = settings_of(folder), _given(folder)
    if (folder / REFUSED).is_file():  # what else is there is another run's
        return Record(folder, settings, [], {}, f"refused: {read_json(folder / REFUSED).get('message')}", given)
    if (folder / FAILED).is_file():
        note = read_json(folder / FAILED)
        kind = [note.get("error")] if "traceback" in note else []  # a foreseen one says it all in its sentence
        told = ": ".join(str(part) for part in (*kind, note.get("message")) if part)
        return Record(folder, settings, [], {}, told or str(note.get("error")), given)
    if not ((folder / "scorecard.json").is_file() and (folder / "run.json").is_file()):
        return Record(folder, settings, [], {}, UNFINISHED, given)
    rows, run = read_json(folder / "scorecard.json"), read_json(folder / "run.json")
    return Record(folder, settings, rows, run, given=given)


def _given(folder: Path) -> frozenset[str]:
    """Keys of the overrides that Hydra wrote down; none of a run that was started without it."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        overrides = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyPatchError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    keys = [str(override).partition("=")[0].lstrip("+~") for override in overrides or []]
    return frozenset([*keys, *(f"{key}.{part}" for key in keys for part in ("name", "kind"))])  # a group by its name


def settings_of(folder: Path) -> dict[str, Any]:
    """The run's config as flat keys; of a run that was refused, what Hydra composed."""
    path = next((p for p in (folder / "config.yaml", folder / ".hydra" / "config.yaml") if p.is_file()), None)
    if path is None:
        raise PolicyPatchError(f"{folder / 'config.yaml'} does not exist: give the folder of a finished run")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)  # Hydra's own copy has interpolations
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise PolicyPatchError(f"{path} is not a valid config: {' '.join(str(error).split())}") from error
    settings = dict(_flat(content))
    unused = NOT_SETTINGS if settings.get("method.name") == "lora" else (*NOT_SETTINGS, "lora")
    return {key: value for key, value in settings.items() if key.partition(".")[0] not in unused}


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, each under its keys joined by dots."""
    if not isinstance(node, dict):
        yield prefix[:-1], node
        return
    for key, value in node.items():
        yield from _flat(value, f"{prefix}{key}.")


def differing(all_settings: Sequence[Mapping[str, Any]], given: Collection[str] = ()) -> list[str]:
    """Keys that tell the runs apart, as few as do, and `seed` where that differs.

    A key that a command set stands for itself (`given`), and so do risk, model and method: that another one changed
    along with it explains nothing away. What is measured beside the rest (`BESIDE`) tells no runs apart.

    An option of a group changes a dozen keys at once. Of keys that part the runs in the same way the one that a reader
    would name stands for all (`method.name`, not `method._target_`), and one that follows from another (the learning
    rate from the method) is left out. The seed stands for nothing but itself, and its copies for nothing at all.
    """
    parted: dict[tuple[int, ...], str] = {}
    names = {key for own in all_settings for key in own if key != "seed" and not key.startswith(BESIDE)}
    names = {key for key in names if not _is_copy(key, all_settings)}
    said = {key: _parts(key, all_settings) for key in sorted(names & {*given, *ALWAYS})}
    said = {key: parts for key, parts in said.items() if len(set(parts)) > 1}
    # A key that some runs have not (an experiment's own) speaks only where no other parts them so.
    partial = {key for key in names if any(key not in own for own in all_settings)}
    for key in sorted(names, key=lambda key: (key in partial, _rank(key), key.count("."), key)):
        parted.setdefault(_parts(key, all_settings), key)
    kept = {parts: key for key, parts in said.items()}
    for parts, key in sorted(parted.items(), key=lambda item: -len(set(item[0]))):
        if len(set(parts)) > 1 and not any(_follows(parts, known) for known in kept):
            kept[parts] = key
    seeds = {str(own.get("seed")) for own in all_settings}
    return sorted({*kept.values(), *said, *(["seed"] if len(seeds) > 1 else [])})


def _parts(key: str, all_settings: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """How a key parts the runs: for each the number of the first one with the same value."""
    values = [str(own.get(key)) for own in all_settings]
    return tuple(values.index(value) for value in values)


def _is_copy(key: str, all_settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key is the seed under another name, or put together from others."""
    if key == "patch.name":
        return True
    return key.endswith(".seed") and all(own[key] == own.get("seed") for own in all_settings if key in own)


def _follows(parts: Sequence[int], known: Sequence[int]) -> bool:
    """Whether runs that agree in `known` always agree in `parts`."""
    return len(set(zip(known, parts, strict=True))) == len(set(known))


def _rank(key: str) -> int:
    """Names and what the command line usually says come first, classes and copies of other keys last."""
    if key in ALWAYS:
        return 0
    if key.startswith(("method.", "init.")):
        return {"name": 0, "kind": 0}.get(key.partition(".")[2], 3)
    return {"name": 1, "enabled": 1, "_target_": 4, "seed": 3}.get(key.rpartition(".")[2], 2)
