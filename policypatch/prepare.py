"""What a run needs, loaded and checked against each other before the expensive part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from policypatch.data.teachers import SampledTeacher, Teacher
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.probes import Probe, SampledProbe
from policypatch.methods import Method, Trained, Untrained
from policypatch.model.base import Base, load_base
from policypatch.model.form import PLAIN
from policypatch.model.latency import NEW_TOKENS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a run works with.

    Attributes:
        base: the frozen base.
        scorer: the language model that perplexity is measured with.
        risk: what is trained against.
        teacher: where pairs come from.
        method: what adapts the base.
        own: probes of the risk.
        others: probes of the other risks and of utility.
    """

    base: Base
    scorer: Base
    risk: Any
    teacher: Teacher
    method: Method
    own: list[Probe]
    others: list[Probe]


def prepare(cfg: DictConfig) -> Prepared:
    """Base, scorer, risks and teacher, and every check that needs them but no training.

    Raises:
        PolicyPatchError: something cannot be had, does not load, or does not fit the rest.
    """
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise PolicyPatchError("trainer=gpu needs a CUDA GPU, and there is none: use trainer=cpu")
    risk, teacher, method = made(cfg.risk, "risk"), made(cfg.teacher, "teacher"), made(cfg.method, "method")
    trained = isinstance(method, Trained)
    if trained and cfg.dpo.enabled and cfg.dpo.reference == "teacher" and not teacher.has_likelihood:
        raise PolicyPatchError(
            f"dpo.reference=teacher needs a teacher with log-probabilities of its own, which {teacher.name} has not: "
            "use dpo.reference=sft or base"
        )
    teacher.check(risk.form)
    own = risk.probes(cfg.evaluate.prompts)
    _ = risk.training_prompts, risk.benign_prompts, risk.benign_texts, risk.swaps  # a missing file ends the run here
    _check_filter(teacher, risk)
    base = load_base(_on_trainers_device(cfg))
    if risk.form.chat:
        base.encode_prompt("A request.", risk.form)  # a base without a chat template ends the run here
    others = _other_probes(cfg, risk, base)
    for judge in {id(j): j for probe in [*own, *others] for j in getattr(probe, "judges", {}).values()}.values():
        judge.score(["A text."], ["A request."])  # one that cannot be had must not be found missing after the training
    _check_method(method, base, teacher, [*own, *others])
    _check_context(cfg, base, risk, teacher, [*own, *others])
    scorer = base if cfg.scorer.name == "base" else load_base(cfg.scorer, "scorer")
    if scorer is not base and not scorer.identity.differences(base.identity):
        raise PolicyPatchError(
            f"scorer {cfg.scorer.name} is the same model as {cfg.model.name}: choose another, or say scorer=base"
        )
    return Prepared(base, scorer, risk, teacher, method, own, others)


def _other_probes(cfg: DictConfig, risk: Any, base: Base) -> list[Probe]:
    """What the patch is measured on beside its own risk; a base that cannot chat is not asked in chats."""
    found: list[Probe] = []
    for name, section in cfg.others.items():
        if name == risk.name:
            continue
        probes = made(section, f"others.{name}").probes(cfg.evaluate.other_prompts)
        if not base.tokenizer.chat_template:
            chats = [probe for probe in probes if probe.chat]
            if chats:
                log.warning("%s has no chat template: %s is left out for it", base.identity.id, name)
            probes = [probe for probe in probes if probe not in chats]
        found += probes
    return found


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


def _check_method(method: Method, base: Base, teacher: Teacher, probes: Sequence[Probe]) -> None:
    """Refuse a method that this base, or the teacher in its place, cannot be asked with."""
    if isinstance(method, Trained):
        method.check(base)
    arm = method.arm(teacher) if isinstance(method, Untrained) else None
    if arm is not None:
        for probe in probes:
            if isinstance(probe, SampledProbe):
                (arm.other or base).encode_prompt("A request.", arm.guidance.around(probe.form))


def made(cfg: DictConfig, key: str) -> Any:
    """What a config group describes; Hydra wraps what its constructor says."""
    try:
        return instantiate(cfg, _convert_="all")  # DictConfig would take a dataclass within it for a schema
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, PolicyPatchError):
            raise cause from error
        raise PolicyPatchError(f"{key} cannot be made: {' '.join(str(cause or error).split())}") from error


def _check_context(cfg: DictConfig, base: Base, risk: Any, teacher: Teacher, probes: Sequence[Probe]) -> None:
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
    decoded = [
        (
            f"risk.evaluation.{probe.split}" if probe.risk == risk.name else f"others.{probe.risk}, {probe.split},",
            probe.prompts,
            probe.form,
            cfg.patch.length,
            (cfg.evaluate.response_sampling if probe.form.chat else cfg.evaluate.sampling).max_new_tokens,
        )
        for probe in probes
        if isinstance(probe, SampledProbe)
    ]
    if new := OmegaConf.select(cfg, "teacher.sampling.max_new_tokens"):
        # Guidance makes a teacher's prompts longer than the base's; where there is none they are the same.
        form = teacher.form(risk.form) if isinstance(teacher, SampledTeacher) else risk.form
        decoded.append(("risk.train", risk.training_prompts, form, 0, new))
        if risk.benign_prompts:
            decoded.append(("risk.benign", risk.benign_prompts, form, 0, new))
        if risk.benign_texts:
            decoded.append(("risk.benign_texts", risk.benign_texts, PLAIN, 0, new))
    if (longest := max(cfg.evaluate.costs.prompts, default=0)) and (
        cfg.patch.length + longest + NEW_TOKENS > base.context
    ):
        raise PolicyPatchError(
            f"evaluate.costs.prompts has {longest}: with {cfg.patch.length} vectors before and {NEW_TOKENS} new tokens "
            f"after it exceeds the context of {cfg.model.name} ({base.context}); shorten it"
        )
    for key, prompts, form, vectors, new in decoded:
        lengths = [len(base.encode_prompt(prompt, form)) for prompt in prompts]
        longest = max(lengths)
        if vectors + longest + new > base.context:
            raise PolicyPatchError(
                f"{key} has a prompt of {longest} tokens (number {lengths.index(longest) + 1}): with {vectors} vectors "
                f"before and {new} new tokens after it exceeds the context of {cfg.model.name} ({base.context}); "
                "shorten prompts, patch or max_new_tokens"
            )
