"""Checks of a composed config that need neither model nor data: whatever is wrong ends here, in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policypatch.errors import PolicyPatchError

# key -> (least value, whether that value itself is allowed)
LOWER_BOUNDS: dict[str, tuple[float, bool]] = {
    "patch.length": (1, True),
    "data.max_prompt_tokens": (1, True),
    "data.max_completion_tokens": (1, True),
    "data.held_out": (0, True),
    "evaluate.k": (1, True),
    "evaluate.ppl_samples": (1, True),
    "evaluate.resamples": (100, True),
    "decode_rows": (1, True),
    "row_tokens": (16, True),
    "dpo.beta": (0, False),
    "dpo.nll_weight": (0, True),
    "dpo.kl_weight": (0, True),
    "dpo.label_smoothing": (0, True),
} | {
    f"{stage}.{key}": bound
    for stage in ("sft", "dpo")
    for key, bound in {
        "steps": (1, True),
        "batch_size": (1, True),
        "lr": (0.0, False),
        "clip": (0.0, False),
        "warmup": (0.0, True),
        "weight_decay": (0.0, True),
    }.items()
}
UPPER_BOUNDS = {"data.held_out": 0.9, "sft.warmup": 1, "dpo.warmup": 1, "dpo.label_smoothing": 0.499}
CHOICES = {
    "sft.decay": ("linear", "cosine", "constant"),
    "dpo.decay": ("linear", "cosine", "constant"),
    "dpo.reference": ("teacher", "sft", "base"),
    "init.kind": ("text", "vocab", "random"),
    "logger.kind": ("wandb", "csv"),
}


def check(cfg: DictConfig) -> None:
    """Refuse values that no run could use.

    Raises:
        PolicyPatchError: naming the key, its value and what is allowed.
    """
    if missing := OmegaConf.missing_keys(cfg):
        raise PolicyPatchError(f"{sorted(missing)[0]} is not set: give it a value on the command line")
    for key, (least, inclusive) in LOWER_BOUNDS.items():
        value = OmegaConf.select(cfg, key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PolicyPatchError(f"{key} is {value!r}: it must be a number")
        if value < least or (value == least and not inclusive):
            raise PolicyPatchError(
                f"{key} is {value}: it must be {'at least' if inclusive else 'greater than'} {least}"
            )
    for key, most in UPPER_BOUNDS.items():
        if OmegaConf.select(cfg, key) > most:
            raise PolicyPatchError(f"{key} is {OmegaConf.select(cfg, key)}: it must be at most {most}")
    for key, allowed in CHOICES.items():
        if OmegaConf.select(cfg, key) not in allowed:
            raise PolicyPatchError(f"{key} is {OmegaConf.select(cfg, key)!r}: choose {', '.join(allowed)}")
    if not (cfg.sft.enabled or cfg.dpo.enabled):
        raise PolicyPatchError("sft.enabled and dpo.enabled are both false: there is nothing to train")
    if cfg.dpo.enabled and cfg.dpo.reference == "sft" and not cfg.sft.enabled:
        raise PolicyPatchError("dpo.reference=sft needs stage 1: set sft.enabled=true or dpo.reference=base")
    if cfg.evaluate.ppl_samples > cfg.evaluate.k:
        raise PolicyPatchError(
            f"evaluate.ppl_samples is {cfg.evaluate.ppl_samples}: at most evaluate.k ({cfg.evaluate.k})"
        )


def check_overrides(arguments: Sequence[str]) -> None:
    """Compose every value that a command line asks for, one at a time, before Hydra starts the first job.

    A sweep whose third value is impossible is refused at once, not after two trainings. Must run inside
    `hydra.initialize*`.

    Raises:
        PolicyPatchError: an unknown key (with the nearest known one), an unknown choice, or what `check` refuses.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except HydraException as error:
        raise PolicyPatchError(f"the command line cannot be read: {_first_line(error)}") from error
    plain = [o.input_line or "" for o in overrides if not o.is_sweep_override()]
    known = compose("config")
    for override in overrides:
        _check_key(override, known)
    for extra in _single_values(overrides):
        try:
            cfg = compose("config", overrides=[*plain, *extra])
            check(cfg)
        except (HydraException, OmegaConfBaseException) as error:
            raise PolicyPatchError(_first_line(error)) from error


def _single_values(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """The first combination of a sweep, then every other value of each swept key with the rest at its first."""
    swept = [o for o in overrides if o.is_sweep_override()]
    if any(not o.is_discrete_sweep() for o in swept):
        yield []
        return
    values = [[f"{o.key_or_group}={v!s}" for v in o.sweep_string_iterator()] for o in swept]
    first = [v[0] for v in values]
    yield first
    for i, options in enumerate(values):
        for option in options[1:]:
            yield [*first[:i], option, *first[i + 1 :]]


def _check_key(override: Override, known: DictConfig) -> None:
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or override.is_delete() or key.startswith("hydra"):
        return
    groups = {"model", "risk", "teacher", "init", "scorer", "trainer", "logger"}
    if key in groups or "@" in key or OmegaConf.select(known, key, default=_ABSENT) is not _ABSENT:
        return
    if key.split(".")[0] in groups:  # another choice of the group may have the key: composing will tell
        return
    near = difflib.get_close_matches(key, list(_keys(known)), n=1, cutoff=0.5)
    hint = f": did you mean {near[0]}?" if near else ": see conf/config.yaml for the keys there are"
    raise PolicyPatchError(f"there is no key {key}{hint}")


_ABSENT: Any = object()


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in cfg:
        yield f"{prefix}{name}"
        node = None if OmegaConf.is_missing(cfg, name) else cfg._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _keys(node, f"{prefix}{name}.")


def _first_line(error: Exception) -> str:
    """Hydra's message in one sentence: what it says, and the options it lists."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    options = [line for line in lines if line.startswith("Available options")]
    if options:
        names = lines[lines.index(options[0]) + 1 :]
        return f"{lines[0]} (there is {', '.join(n for n in names if not n.startswith('Config search'))})"
    return lines[0] if lines else type(error).__name__
