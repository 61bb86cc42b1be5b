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

from policypatch import ranks
from policypatch.context import check_context, check_readings
from policypatch.data.teachers import Teacher
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.measure import Settings
from policypatch.evaluate.probes import Bench, Plan, Probe, SampledProbe
from policypatch.methods import Method, Trained, Untrained
from policypatch.model.base import Base
from policypatch.model.judging import judged
from policypatch.model.load import load_base
from policypatch.model.sampling import Sampling

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
        plan: how arms are asked.
    """

    base: Base
    scorer: Base
    risk: Any
    teacher: Teacher
    method: Method
    own: list[Probe]
    others: list[Probe]
    plan: Plan

    def bench(self, cfg: DictConfig) -> Bench:
        """What arms are measured with."""
        settings = Settings(cfg.evaluate.level, cfg.evaluate.resamples)
        return Bench(self.base, self.scorer, cfg.scorer.name, self.plan, settings)


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
    base = load_base(_on_trainers_device(cfg), sharded=cfg.trainer.shard and ranks.size() > 1)
    if risk.form.chat:
        base.encode_prompt("A request.", risk.form)  # a base without a chat template ends the run here
    others = _other_probes(cfg, risk, base)
    for judge in {id(j): j for probe in [*own, *others] for j in getattr(probe, "judges", {}).values()}.values():
        # One that cannot be had, or answers with NaN, must not be found out after the training.
        judged(judge, ["A text."], ["A request."], k=1)
    _check_method(method, base, teacher, [*own, *others])
    scorer = base if cfg.scorer.name == "base" else load_base(cfg.scorer, "scorer")
    if scorer is not base and not scorer.identity.differences(base.identity):
        raise PolicyPatchError(
            f"scorer {cfg.scorer.name} is the same model as {cfg.model.name}: choose another, or say scorer=base"
        )
    plan = _plan(cfg)
    check_context(cfg, base, risk, teacher, method.longest)
    check_readings(cfg, own, others, plan, base, scorer, method.length)
    return Prepared(base, scorer, risk, teacher, method, own, others, plan)


def _plan(cfg: DictConfig) -> Plan:
    """How arms are asked."""
    evaluate = cfg.evaluate
    return Plan(
        evaluate.k,
        Sampling(**evaluate.sampling),
        evaluate.responses,
        Sampling(**evaluate.response_sampling),
        evaluate.seed,
        evaluate.ppl_samples,
        cfg.decode_rows,
        cfg.row_tokens,
    )


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
