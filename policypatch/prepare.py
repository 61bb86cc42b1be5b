"""What a run needs, loaded and checked against each other before the expensive part."""

from __future__ import annotations

import logging
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from policypatch.data.teachers import Teacher
from policypatch.errors import PolicyPatchError
from policypatch.model.base import Base, load_base

log = logging.getLogger(__name__)


def prepare(cfg: DictConfig) -> tuple[Base, Base, Any, Teacher]:
    """Base, scorer, risk and teacher, and every check that needs them but no training.

    Raises:
        PolicyPatchError: something cannot be had, does not load, or does not fit the rest.
    """
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise PolicyPatchError("trainer=gpu needs a CUDA GPU, and there is none: use trainer=cpu")
    risk, teacher = _made(cfg.risk, "risk"), _made(cfg.teacher, "teacher")
    if cfg.dpo.enabled and cfg.dpo.reference == "teacher" and not teacher.has_likelihood:
        raise PolicyPatchError(
            f"dpo.reference=teacher needs a teacher with log-probabilities of its own, which {teacher.name} has not: "
            "use dpo.reference=sft or base"
        )
    _ = risk.evaluation_prompts, risk.training_prompts  # a missing file ends the run here
    for judge in risk.judges.values():
        judge.score(["A text."])  # one that cannot be had must not be found missing after the training
    _check_filter(teacher, risk)
    base = load_base(_on_trainers_device(cfg))
    _check_context(cfg, base, risk)
    scorer = base if cfg.scorer.name == "base" else load_base(cfg.scorer, "scorer")
    if scorer is not base and not scorer.identity.differences(base.identity):
        raise PolicyPatchError(
            f"scorer {cfg.scorer.name} is the same model as {cfg.model.name}: choose another, or say scorer=base"
        )
    return base, scorer, risk, teacher


def _on_trainers_device(cfg: DictConfig) -> DictConfig:
    """The model's config with `device: auto` resolved to where the trainer works."""
    device = "cuda" if cfg.trainer.accelerator == "gpu" else "cpu"
    if cfg.model.device not in ("auto", device) and not cfg.model.device.startswith(f"{device}:"):
        raise PolicyPatchError(
            f"model.device is {cfg.model.device} but the trainer works on {device}: set model.device=auto"
        )
    merged = OmegaConf.merge(cfg.model, {"device": device} if cfg.model.device == "auto" else {})
    assert isinstance(merged, DictConfig)
    return merged


def _check_filter(teacher: Teacher, risk: Any) -> None:
    """Refuse judges that the risk has not; warn where no judge is left that did not choose the pairs."""
    if unknown := set(teacher.filter_judges) - set(risk.judges):
        raise PolicyPatchError(
            f"teacher.judges names {', '.join(sorted(unknown))}, which this risk has not: "
            f"choose from {', '.join(risk.judges)}"
        )
    if set(teacher.filter_judges) == set(risk.judges):
        log.warning(
            "every judge of the scorecard also chose the training pairs, which flatters the patch: "
            "add one that does not to risk.judges"
        )


def _made(cfg: DictConfig, key: str) -> Any:
    """What a config group describes; Hydra wraps what its constructor says."""
    try:
        return instantiate(cfg)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, PolicyPatchError):
            raise cause from error
        raise PolicyPatchError(f"{key} cannot be made: {' '.join(str(cause or error).split())}") from error


def _check_context(cfg: DictConfig, base: Base, risk: Any) -> None:
    """Refuse what does not fit into the base's positions, whether trained or decoded."""
    if base.context is None:
        return
    trained = cfg.data.max_prompt_tokens + cfg.data.max_completion_tokens
    if cfg.patch.length + trained > base.context:
        raise PolicyPatchError(
            f"patch.length is {cfg.patch.length}: with prompts and completions of up to {trained} tokens it exceeds "
            f"the context of {cfg.model.name} ({base.context}); shorten patch.length, data.max_prompt_tokens or "
            "data.max_completion_tokens"
        )
    decoded = [("risk.evaluation", risk.evaluation_prompts, cfg.patch.length, cfg.evaluate.sampling.max_new_tokens)]
    if new := OmegaConf.select(cfg, "teacher.sampling.max_new_tokens"):
        decoded.append(("risk.train", risk.training_prompts, 0, new))
    for key, prompts, vectors, new in decoded:
        longest = max(len(base.encode_prompt(prompt)) for prompt in prompts)
        if vectors + longest + new > base.context:
            raise PolicyPatchError(
                f"{key} has a prompt of {longest} tokens: with {vectors} vectors before and {new} new tokens after it "
                f"exceeds the context of {cfg.model.name} ({base.context}); shorten prompts, patch or max_new_tokens"
            )
