"""What a run needs, loaded and checked against each other before the expensive part."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from policypatch import ranks
from policypatch.context import check_context, check_prompts, check_readings
from policypatch.data.teachers import Teacher
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.measure import Settings
from policypatch.evaluate.probes import Bench, Plan, Probe, SampledProbe
from policypatch.methods import Method, Trained, Untrained
from policypatch.model.base import Base
from policypatch.model.judging import judged
from policypatch.model.load import load_base
from policypatch.model.packed import can_compile
from policypatch.model.sampling import Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A risk that is trained against, and where its pairs come from; risk=joint has several.

    Attributes:
        risk: prompts, judges, probes.
        teacher: makes pairs of them.
        limit: prompts of each of its sets that arms are asked, None for all.
        key: where the risk stands in the config.
        teacher_key: where the teacher does.
    """

    risk: Any
    teacher: Teacher
    limit: int | None
    key: str = "risk"
    teacher_key: str = "teacher"

    @cached_property
    def probes(self) -> list[Probe]:
        """What arms are asked about the risk."""
        return list(self.risk.probes(self.limit))

    @contextmanager
    def named(self) -> Iterator[None]:
        """What goes wrong meanwhile is told by the part's own keys."""
        try:
            yield
        except PolicyPatchError as error:
            told, keys = str(error), {"risk": self.key, "teacher": self.teacher_key}
            if self.key == "risk" or self.key in told or self.teacher_key in told:
                raise
            told = re.sub(r"\b(risk|teacher)\.(?=[a-z])", lambda found: f"{keys[found[1]]}.", told)
            raise PolicyPatchError(told) from error


@dataclass(frozen=True)
class Prepared:
    """What a run works with.

    Attributes:
        base: the frozen base.
        scorer: the language model that perplexity is measured with.
        parts: what is trained against, one for each risk.
        method: what adapts the base.
        own: probes of these risks.
        others: probes of the other risks and of utility.
        plan: how arms are asked.
        marked: of each risk that was or may have been trained against, the judges that choose its pairs, and what else
            has a part in training (`Risk.shares`).
    """

    base: Base
    scorer: Base
    parts: list[Part]
    method: Method
    own: list[Probe]
    others: list[Probe]
    plan: Plan
    marked: dict[str, list[str]]

    @property
    def teachers(self) -> list[Teacher]:
        """Where pairs come from, one for each risk."""
        return [part.teacher for part in self.parts]

    def bench(self, cfg: DictConfig) -> Bench:
        """What arms are measured with."""
        settings = Settings(cfg.evaluate.level, cfg.evaluate.resamples)
        return Bench(self.base, self.scorer, cfg.scorer.name, self.plan, settings)


def prepare(cfg: DictConfig, vectors: int = 0) -> Prepared:
    """Base, scorer, risks and teacher, and every check that needs them but no training.

    Args:
        cfg: the composed config.
        vectors: at least so many will stand before everything, whatever the method says.

    Raises:
        PolicyPatchError: something cannot be had, does not load, or does not fit the rest.
    """
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise PolicyPatchError("trainer=gpu needs a CUDA GPU, and there is none: use trainer=cpu")
    if cfg.trainer.compile and not can_compile(cfg.trainer.accelerator):
        raise PolicyPatchError(
            "trainer.compile needs a C++ compiler, and there is none: install g++ or set it to false"
        )
    parts, method = _parts(cfg), made(cfg.method, "method")
    trained = isinstance(method, Trained)
    for part in parts:
        with part.named():
            _check_part(cfg, part, trained)
    own = [probe for part in parts for probe in part.probes]
    base = load_base(_on_trainers_device(cfg), sharded=cfg.trainer.shard and ranks.size() > 1)
    for part in parts:
        if part.risk.form.chat:
            base.encode_prompt("A request.", part.risk.form)  # a base without a chat template ends the run here
    others = _other_probes(cfg, [part.risk.name for part in parts], base)
    for judge in {id(j): j for probe in [*own, *others] for j in getattr(probe, "judges", {}).values()}.values():
        # One that cannot be had, or answers with NaN, must not be found out after the training.
        judged(judge, ["A text."], ["A request."], k=1)
    _check_method(method, base, parts, [*own, *others])
    scorer = base if cfg.scorer.name == "base" else load_base(cfg.scorer, "scorer")
    if scorer is not base and not scorer.identity.differences(base.identity):
        raise PolicyPatchError(
            f"scorer {cfg.scorer.name} is the same model as {cfg.model.name}: choose another, or say scorer=base"
        )
    plan = _plan(cfg)
    check_context(cfg, base, max(vectors, method.longest))
    for part in parts:
        check_prompts(cfg, base, part.risk, part.teacher, part.key, part.teacher_key)
    keys = {part.risk.name: part.key for part in parts}
    check_readings(cfg, keys, [*own, *others], plan, base, scorer, max(vectors, method.length))
    marked = marked_of_others(cfg) if method.made_before or method.parents else {}
    marked |= {part.risk.name: [*part.teacher.filter_judges, *part.risk.shares] for part in parts}
    return Prepared(base, scorer, parts, method, own, others, plan, marked)


def marked_of_others(cfg: DictConfig) -> dict[str, list[str]]:
    """Of each other risk what chooses its pairs, and what else has a part in its training."""
    sections = {section.get("name", key): section for key, section in cfg.others.items()}
    return {risk: [*(of.get("filter") or ()), *(of.get("shares") or ())] for risk, of in sections.items()}


def _parts(cfg: DictConfig) -> list[Part]:
    """The risk and its teacher, or all those of a joint one."""
    limit = cfg.evaluate.prompts
    if "parts" not in cfg.risk:
        return [Part(made(cfg.risk, "risk"), made(cfg.teacher, "teacher"), limit)]
    found = []
    for name, part in cfg.risk.parts.items():
        key, teacher = f"risk.parts.{name}.risk", f"risk.parts.{name}.teacher"
        found.append(Part(made(part.risk, key), made(part.teacher, teacher), limit, key, teacher))
    names = [part.risk.name for part in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PolicyPatchError(f"risk.parts has two risks that are called {twice[0]}: give one another name")
    return found


def _check_part(cfg: DictConfig, part: Part, trained: bool) -> None:
    """Refuse a teacher that cannot do what is asked of it; a missing file ends the run here."""
    risk, teacher = part.risk, part.teacher
    if trained and cfg.dpo.enabled and cfg.dpo.reference == "teacher" and not teacher.has_likelihood:
        raise PolicyPatchError(
            f"dpo.reference=teacher needs a teacher with log-probabilities of its own, which {teacher.name} has not: "
            "use dpo.reference=sft or base"
        )
    teacher.check(risk.form)
    _ = part.probes, risk.training_prompts, risk.benign_prompts, risk.benign_texts, risk.swaps
    _check_filter(teacher, risk)


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


def _other_probes(cfg: DictConfig, own: Sequence[str], base: Base) -> list[Probe]:
    """What the patch is measured on beside its own risk; a base that cannot chat is not asked in chats."""
    found: list[Probe] = []
    for name, section in cfg.others.items():
        if name in own:
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


def _check_method(method: Method, base: Base, parts: Sequence[Part], probes: Sequence[Probe]) -> None:
    """Refuse a method that this base, or the teacher in its place, cannot be asked with."""
    method.check(base)
    for arm in method.arms([part.teacher for part in parts]) if isinstance(method, Untrained) else ():
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
