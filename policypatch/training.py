"""What a method is trained on and how: pairs -> SFT -> DPO, from the config.

Pairs and the reference's log-probabilities are made once for everything they depend on, and kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from policypatch.data.datamodule import Example, PairData, encode_pair
from policypatch.data.pairs import IN_BATCH, ROWS, save_pairs
from policypatch.data.prompts import normalise
from policypatch.data.teachers import PairSet, Teacher, TeacherContext, joined
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.probes import Probe, SampledProbe
from policypatch.files.atomic import write_json
from policypatch.files.cache import content_key, entry
from policypatch.methods import Trained
from policypatch.model.arm import Arm
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.logprobs import item_logprobs
from policypatch.patch.artifact import digest
from policypatch.prepare import Prepared
from policypatch.progress import Clock
from policypatch.report.tracking import Tracker
from policypatch.train.dpo_module import DPOModule, PreferenceSettings
from policypatch.train.module import StageModule
from policypatch.train.pair_stage import Weights
from policypatch.train.sft_module import SFTModule
from policypatch.train.shared import trained_once
from policypatch.train.stage import optimisation, run_stage

log = logging.getLogger(__name__)


def trained_arms(
    cfg: DictConfig, ready: Prepared, method: Trained, arms: list[Arm], clock: Clock, tracker: Tracker, folder: Path
) -> PairSet:
    """Pairs, then both stages; adds an arm for each to `arms`. Returns the pairs."""
    base = ready.base
    with clock("pairs"):
        contexts = [teacher_context(cfg, base, part.risk) for part in ready.parts]
        pair_set = _pairs_of_all(ready, contexts)
        save_pairs(folder / "pairs.jsonl", pair_set.pairs)
        examples = _encoded(cfg, base, pair_set)
    backbone = method.start(base, cfg.seed, cfg.row_tokens)
    if cfg.sft.enabled:
        with clock("sft"):
            sft = SFTModule(backbone, optimisation(cfg.sft), _weights(cfg))
            about = _about(cfg, "sft", base, pair_set, method)
            _train(cfg, sft, _data(cfg, cfg.sft, examples, backbone, 1), about, pair_set, tracker, folder)
            arms.append(method.arm("sft", backbone))
    if cfg.dpo.enabled:
        with clock("dpo"):
            reference = _reference(cfg, base, arms[-1], ready.teachers, contexts, pair_set, examples)
            if cfg.dpo.reference != "teacher":
                last = arms[-1].vectors if cfg.dpo.reference == "sft" else None
                backbone.reference = backbone.patch.detach()[:0] if last is None else last
            preference = PreferenceSettings(cfg.dpo.beta, cfg.dpo.nll_weight, cfg.dpo.label_smoothing)
            dpo = DPOModule(backbone, optimisation(cfg.dpo), preference, _weights(cfg))
            about = _about(cfg, "dpo", base, pair_set, method) | {"reference_logprobs": digest(reference)}
            _train(cfg, dpo, _data(cfg, cfg.dpo, examples, backbone, 2, reference), about, pair_set, tracker, folder)
            arms.append(method.arm(method.name, backbone))
    return pair_set


def _train(
    cfg: DictConfig,
    module: StageModule,
    data: PairData,
    about: dict[str, Any],
    pair_set: PairSet,
    tracker: Tracker,
    folder: Path,
) -> None:
    """Have a stage trained, here or by a run of the same settings before."""
    with tracker.job(module.stage) as job:
        job.reads(folder / "pairs.jsonl", pair_set.counts)
        loggers = job.loggers()
        train = partial(run_stage, module, data, cfg[module.stage], cfg.trainer, folder, loggers)
        trained_once(module.stage, folder, about, module.backbone, train, loggers)


def teacher_context(cfg: DictConfig, base: Base, risk: Any) -> TeacherContext:
    """What the teacher may use."""
    return TeacherContext(
        base,
        risk.training_prompts,
        risk.judges,
        cfg.seed,
        cfg.decode_rows,
        risk.form,
        risk.benign_prompts,
        risk.benign_texts,
        risk.swaps,
        risk.compliance,
        cfg.row_tokens,
    )


def _pairs_of_all(ready: Prepared, contexts: Sequence[TeacherContext]) -> PairSet:
    """The pairs of the risk; of several, of each what it has alone less what arms are asked about the others."""
    sets = {}
    for part, context in zip(ready.parts, contexts, strict=True):
        with part.named():
            sets[part.risk.name] = made_pairs(context, part.probes, part.teacher)
    if len(sets) == 1:
        return next(iter(sets.values()))
    measured = _measured_prompts(ready.own)
    return joined({name: pairs.without(measured, begun=True) for name, pairs in sets.items()})


def made_pairs(context: TeacherContext, own: Sequence[Probe], teacher: Teacher) -> PairSet:
    """The teacher's pairs, made once for everything they depend on."""
    evaluation = _measured_prompts(own)
    about = teacher.identity() | {
        "base": asdict(context.base.identity),
        "dtype": str(context.base.model.dtype),
        "prompts": list(context.prompts),
        "benign_prompts": list(context.benign),
        "benign_texts": list(context.benign_texts),
        "swaps": dict(context.swaps),
        "form": asdict(context.form),
        "compliance": context.compliance,
        "judge_fingerprints": {name: context.judges[name].fingerprint for name in teacher.filter_judges},
        "seed": context.seed,
        "eos": list(context.base.eos),
        "evaluation": sorted(evaluation),
        "rows": ROWS,
    }

    def build(target: Path) -> None:
        made = teacher.pairs(context).without(evaluation)
        if not any(pair.kind == "pair" for pair in made.pairs):
            raise PolicyPatchError(
                f"no pair passed teacher.filter ({made.counts}): loosen its thresholds, raise teacher.n or give more "
                "prompts"
            )
        save_pairs(target / "pairs.jsonl", made.pairs)
        write_json(target / "counts.json", made.counts)

    shown = {
        k: v for k, v in about.items() if k not in ("prompts", "benign_prompts", "benign_texts", "swaps", "evaluation")
    }
    cached = entry("pairs", content_key(**about), build, about=shown, together=True)
    pair_set = PairSet.read(cached / "pairs.jsonl", cached / "counts.json")
    log.info("%d pairs (%s)", len(pair_set.pairs), pair_set.counts)
    return pair_set


def _measured_prompts(probes: Sequence[Probe]) -> set[str]:
    """What arms are asked, normalised: it must not be trained on."""
    return {normalise(prompt) for probe in probes if isinstance(probe, SampledProbe) for prompt in probe.prompts}


def _about(cfg: DictConfig, stage: str, base: Base, pair_set: PairSet, method: Trained) -> dict[str, Any]:
    """What a stage depends on beside where its tensors begin."""
    read = (stage, "data", "kl", "texts", "balance", "seed", "row_tokens", "method")
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    found = {key: resolved[key] for key in read} | {
        "base": asdict(base.identity),
        "dtype": str(base.model.dtype),
        "attention": cfg.model.attention,
        "accelerator": cfg.trainer.accelerator,
        "validate_every": cfg.trainer.validate_every,
        "pairs": pair_set.sha256,
        "companions": [companion.sha256 for companion in method.companions],
    }
    return found | ({"parts": list(pair_set.parts)} if pair_set.risks else {})


def _encoded(cfg: DictConfig, base: Base, pair_set: PairSet) -> list[Example]:
    """The pairs as token ids."""
    eos, limits = next(iter(base.eos), None), (cfg.data.max_prompt_tokens, cfg.data.max_completion_tokens)
    encoded = [encode_pair(pair, base.encode_prompt, base.encode, eos, *limits) for pair in pair_set.pairs]
    return [replace(example, part=part) for example, part in zip(encoded, pair_set.parts, strict=True)]


def _data(
    cfg: DictConfig,
    stage: DictConfig,
    examples: list[Example],
    backbone: PrefixBackbone,
    completions: int,
    reference: Tensor | None = None,
) -> PairData:
    """A stage's batches."""
    anchor = cfg.kl.rows if cfg.kl.weight else None
    return PairData(
        examples,
        stage.batch_size,
        stage.steps,
        cfg.seed,
        completions,
        backbone.tree,
        reference,
        cfg.data.held_out,
        cfg.data.benign_share,
        anchor,
        cfg.texts.rows if cfg.texts.weight else 0,
        cfg.balance.rows if cfg.balance.weight else 0,
    )


def _weights(cfg: DictConfig) -> Weights:
    """Of what both stages' losses have beside their own."""
    return Weights(cfg.kl.weight, cfg.texts.weight, cfg.balance.weight)


def _reference(
    cfg: DictConfig,
    base: Base,
    last: Arm,
    teachers: Sequence[Teacher],
    contexts: Sequence[TeacherContext],
    pair_set: PairSet,
    examples: list[Example],
) -> Tensor:
    """(rows, 2) log-probabilities under the teacher of each row, the last arm (that of stage 1), or the base.

    NaN where a row states no preference.
    """
    preferred = [i for i, e in enumerate(examples) if e.kind in IN_BATCH and len(e.item.completions) == 2]
    reference = torch.full((len(examples), 2), torch.nan)
    if cfg.dpo.reference == "teacher":
        for part, (teacher, context) in enumerate(zip(teachers, contexts, strict=True)):
            rows = [i for i in preferred if examples[i].part == part]
            items = [examples[i].item for i in rows]
            reference[rows] = teacher.likelihood(context, [pair_set.pairs[i] for i in rows], items).cpu()
    else:
        arm = Arm("base") if cfg.dpo.reference == "base" else last
        with arm.on(base) as asked:
            items = [examples[i].item for i in preferred]
            reference[preferred] = item_logprobs(asked, arm.vectors, items, cfg.row_tokens).cpu()
    return reference
