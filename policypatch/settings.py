"""Checks of a composed config that need neither model nor data: whatever is wrong ends here, in one sentence."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policypatch.errors import Number, PolicyPatchError

NUMBERS: dict[str, Number] = {
    "seed": Number(least=0, most=2**32 - 1, whole=True),
    "patch.length": Number(least=1, whole=True),
    "patch.dropout": Number(least=0, most=1),
    "data.max_prompt_tokens": Number(least=1, whole=True),
    "data.max_completion_tokens": Number(least=1, whole=True),
    "data.held_out": Number(least=0, most=0.9),
    "data.benign_share": Number(least=0, most=1, null=True),
    "dpo.beta": Number(above=0),
    "dpo.nll_weight": Number(least=0),
    "kl.weight": Number(least=0),
    "texts.rows": Number(least=0, whole=True),
    "texts.weight": Number(least=0),
    "balance.rows": Number(least=0, whole=True),
    "balance.weight": Number(least=0),
    "dpo.label_smoothing": Number(least=0, most=0.499),
    "evaluate.prompts": Number(least=1, whole=True, null=True),
    "evaluate.other_prompts": Number(least=1, whole=True, null=True),
    "evaluate.k": Number(least=1, whole=True),
    "evaluate.responses": Number(least=1, whole=True),
    "evaluate.seed": Number(least=0, whole=True),
    "evaluate.ppl_samples": Number(least=1, whole=True),
    "evaluate.level": Number(above=0, most=0.9999),
    "evaluate.resamples": Number(least=100, whole=True),
    "evaluate.costs.repeats": Number(least=1, whole=True),
    "decode_rows": Number(least=1, whole=True),
    "row_tokens": Number(least=16, whole=True),
    "trainer.num_nodes": Number(least=1, whole=True),
    "trainer.head_logits": Number(least=1, whole=True, null=True),
    "trainer.threads": Number(least=1, whole=True, null=True),
    "trainer.checkpoint_every": Number(least=1, whole=True),
    "trainer.validate_every": Number(least=1, whole=True),
} | {
    f"{stage}.{key}": number
    for stage in ("sft", "dpo")
    for key, number in {
        "steps": Number(least=1, whole=True),
        "batch_size": Number(least=1, whole=True),
        "lr": Number(above=0),
        "clip": Number(above=0),
        "warmup": Number(least=0, most=1),
        "weight_decay": Number(least=0),
    }.items()
}
# Those that only some options of their group have.
OPTIONAL_NUMBERS = {
    "init.scale": Number(above=0),
    "risk.threshold": Number(above=0, below=1),
    "risk.near": Number(above=0, most=1, null=True),
}
CHOICES = {
    "sft.decay": ("linear", "cosine", "constant"),
    "dpo.decay": ("linear", "cosine", "constant"),
    "dpo.reference": ("teacher", "sft", "base"),
    "kl.rows": ("benign", "all"),
    "init.kind": ("text", "vocab", "random", "patch"),
    "logger.kind": ("wandb", "csv"),
    "trainer.accelerator": ("cpu", "gpu"),
}
SWITCHES = ("sft.enabled", "dpo.enabled", "evaluate.after_sft", "trainer.recompute", "trainer.compile", "trainer.shard")
OPTIONAL_CHOICES = {"logger.mode": ("offline", "online", "shared", "disabled")}
PATTERNS = {
    "name": (
        r"(?!\.+(/|$))[A-Za-z0-9._-]+(/(?!\.+(/|$))[A-Za-z0-9._-]+)*",
        "a folder's name of letters, digits, dots, dashes and underscores, or several with / between them",
    ),
    # What the manifest allows (patch/manifest.schema.json), asked for before training rather than after it.
    "patch.name": (r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "letters, digits, dots, dashes and underscores"),
    "patch.version": (
        r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?",
        "a version such as 1.0.0",
    ),
}


ABSENT: Any = object()
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")  # names of environment variables that hold one
SECRET_LENGTH = 12  # shorter values are no keys, and stand in texts by chance


def check(cfg: DictConfig) -> None:
    """Refuse values that no run could use.

    Raises:
        PolicyPatchError: naming the key, its value and what is allowed.
    """
    _check_parts(cfg)
    if missing := OmegaConf.missing_keys(cfg):
        raise PolicyPatchError(f"{sorted(missing)[0]} is not set: give it a value on the command line")
    _refuse_secrets(cfg)
    for key, number in NUMBERS.items():
        number.check(key, OmegaConf.select(cfg, key))
    for key, number in OPTIONAL_NUMBERS.items():
        if (value := OmegaConf.select(cfg, key, default=ABSENT)) is not ABSENT:
            number.check(key, value)
    for key, allowed in CHOICES.items():
        _check_choice(key, OmegaConf.select(cfg, key), allowed)
    for key, allowed in OPTIONAL_CHOICES.items():
        if (value := OmegaConf.select(cfg, key, default=ABSENT)) is not ABSENT:
            _check_choice(key, value, allowed)
    if (devices := cfg.trainer.devices) != "all":
        Number(least=1, whole=True).check("trainer.devices", devices)
    elif cfg.trainer.accelerator != "gpu":
        raise PolicyPatchError("trainer.devices=all is for GPUs: say how many processes are to share the CPU")
    for key, (pattern, what) in PATTERNS.items():
        value = OmegaConf.select(cfg, key)
        if value is None or not re.fullmatch(pattern, str(value), re.ASCII):
            raise PolicyPatchError(f"{key} is {value!r}: give {what}")
    for key in SWITCHES:
        if not isinstance(value := OmegaConf.select(cfg, key), bool):
            raise PolicyPatchError(f"{key} is {value!r}: choose true or false")
    for stage in ("sft", "dpo"):
        betas = cfg[stage].betas
        if not (OmegaConf.is_list(betas) and len(betas) == 2 and all(_is_share(b) for b in betas)):
            raise PolicyPatchError(f"{stage}.betas is {betas}: give two numbers, at least 0 and less than 1")
    for key in ("evaluate.costs.prompts", "evaluate.costs.batches"):
        numbers = OmegaConf.select(cfg, key)
        if not OmegaConf.is_list(numbers):
            raise PolicyPatchError(f"{key} is {numbers!r}: give a list of whole numbers, [] for none")
        for number in numbers:
            Number(least=1, whole=True).check(key, number)
    if cfg.trainer.shard and OmegaConf.select(cfg, "model.quantize") is not None:
        raise PolicyPatchError("trainer.shard shares a whole base out: set model.quantize=null or trainer.shard=false")
    if cfg.trainer.shard and cfg.trainer.compile:
        raise PolicyPatchError("trainer.compile is for a base that a rank has whole: set it or trainer.shard to false")
    if not (cfg.sft.enabled or cfg.dpo.enabled):
        raise PolicyPatchError("sft.enabled and dpo.enabled are both false: there is nothing to train")
    if cfg.dpo.enabled and cfg.dpo.reference == "sft" and not cfg.sft.enabled:
        raise PolicyPatchError("dpo.reference=sft needs stage 1: set sft.enabled=true or dpo.reference=base")
    if cfg.patch.companions and "companions" not in cfg.method:
        raise PolicyPatchError("patch.companions stand around a patch: set method=patch or patch.companions=[]")
    if cfg.evaluate.ppl_samples > cfg.evaluate.k:
        raise PolicyPatchError(
            f"evaluate.ppl_samples is {cfg.evaluate.ppl_samples}: at most evaluate.k ({cfg.evaluate.k})"
        )
    for key, kind in _sections(cfg).items():
        _check_section(cfg, key, kind)


def _check_parts(cfg: DictConfig) -> None:
    """Refuse a teacher for all risks of risk=joint, which each have their own, and what has no risk at all."""
    joint = "_target_" not in cfg.risk
    if joint and not cfg.risk.get("parts"):
        raise PolicyPatchError("risk names no risk: choose files of conf/risk/, as risk=[toxicity,harmfulness]")
    if joint and "_target_" in cfg.teacher:
        raise PolicyPatchError(
            "risk=joint has a teacher for each risk: say teacher@risk.parts.NAME.teacher=FILE, not teacher=FILE"
        )
    if not joint and "_target_" not in cfg.teacher:
        raise PolicyPatchError("teacher=of_parts is risk=joint's: choose another file of conf/teacher/")
    for name, part in cfg.risk.parts.items() if joint else ():
        if not (OmegaConf.is_dict(part) and "risk" in part and "teacher" in part):
            raise PolicyPatchError(f"risk.parts.{name} needs a risk and a teacher: choose a file of conf/part/")


def _refuse_secrets(cfg: DictConfig) -> None:
    """Refuse what is secret in the environment as a value, which files, logs and manifests would hold for all."""
    named = {name: value for name, value in os.environ.items() if SECRET.search(name)}
    known = {value: name for name, value in named.items() if len(value) >= SECRET_LENGTH}
    for key, value in _leaves(OmegaConf.to_container(cfg, resolve=True)):
        for secret, name in known.items():
            if secret in value:
                raise PolicyPatchError(
                    f"{key} holds what the environment variable {name} keeps secret, and a run writes its config down: "
                    "leave it out, as whatever needs it reads the variable itself"
                )


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts of a container, each with its key."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, key)
    elif isinstance(node, str):
        yield key, node


def _check_choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise PolicyPatchError(f"{key} is {value!r}: choose {', '.join(allowed)}")


def _sections(cfg: DictConfig) -> dict[str, type]:
    """The blocks that a dataclass stands for. A teacher or risk of the user's own may have blocks of its own."""
    # Here, as they import torch: a misspelt key is refused without waiting for it.
    from policypatch.data.pairs import PairFilter
    from policypatch.data.prompts import PromptSet
    from policypatch.model.sampling import Sampling

    found: dict[str, type] = {"evaluate.sampling": Sampling, "evaluate.response_sampling": Sampling}
    kinds: dict[str, type] = {"sampling": Sampling, "filter": PairFilter}
    parts = OmegaConf.select(cfg, "risk.parts") or ()
    for teacher in ("teacher", *(f"risk.parts.{part}.teacher" for part in parts)):
        node = OmegaConf.select(cfg, teacher)
        if str(OmegaConf.select(node, "_target_")).startswith("policypatch."):
            found |= {f"{teacher}.{name}": kind for name, kind in kinds.items() if name in node}
    target = f"{PromptSet.__module__}.{PromptSet.__qualname__}"
    return found | {key: PromptSet for group in ("risk", "others") for key in _made_as(cfg[group], target, group)}


def _made_as(node: Any, target: str, key: str) -> Iterator[str]:
    """The keys at or below `key` whose `_target_` is this one."""
    if not OmegaConf.is_dict(node):
        return
    if OmegaConf.select(node, "_target_") == target:
        yield key
    for name in node:
        if not OmegaConf.is_missing(node, name):
            yield from _made_as(node[name], target, f"{key}.{name}")


def _check_section(cfg: DictConfig, key: str, kind: type) -> None:
    """Refuse what the dataclass refuses, and keys that it has not, by their full names."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    section = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(section):
        raise PolicyPatchError(f"{key} is {section!r}: it must hold {', '.join(fields)}")
    resolved = OmegaConf.to_container(section, resolve=True)
    assert isinstance(resolved, dict)
    given = {str(name): value for name, value in resolved.items() if name != "_target_"}
    if unknown := [name for name in given if name not in fields]:
        raise PolicyPatchError(f"there is no key {key}.{unknown[0]}: choose from {', '.join(fields)}")
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING:
            raise PolicyPatchError(f"{key}.{name} is not set: give it a value")
    try:
        kind(**given)
    except PolicyPatchError as error:
        raise PolicyPatchError(f"{key}.{error}") from error


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
