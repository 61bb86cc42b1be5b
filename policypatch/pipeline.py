"""One run, read top to bottom: pairs -> SFT -> DPO -> evaluate -> package -> report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from policypatch.data.datamodule import Example, PairData, encode_pair
from policypatch.data.pairs import IN_BATCH, ROWS, save_pairs
from policypatch.data.prompts import normalise
from policypatch.data.teachers import PairSet, Teacher, TeacherContext
from policypatch.errors import ForeignFolder, PolicyPatchError
from policypatch.evaluate.arms import evaluate_arms
from policypatch.evaluate.costs import Training, latency_rows, size_rows
from policypatch.evaluate.measure import Settings
from policypatch.evaluate.probes import Bench, Plan, Probe, SampledProbe
from policypatch.evaluate.scorecard import Scorecard
from policypatch.files.atomic import write_json, write_text
from policypatch.files.cache import content_key, entry, reset_counters
from policypatch.logs import quiet_libraries
from policypatch.methods import Trained, Untrained
from policypatch.model.arm import Arm
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.latency import Load
from policypatch.model.logprobs import item_logprobs
from policypatch.model.sampling import Sampling
from policypatch.outcome import package, record, say
from policypatch.prepare import Prepared, prepare
from policypatch.report.records import FAILED
from policypatch.report.run_report import write_report
from policypatch.report.tracking import Tracker, open_tracker
from policypatch.settings import check
from policypatch.train.dpo_module import DPOModule, PreferenceSettings
from policypatch.train.module import Weights
from policypatch.train.sft_module import SFTModule
from policypatch.train.stage import optimisation, run_stage, stage_cost

log = logging.getLogger(__name__)


def run(cfg: DictConfig, folder: Path, overrides: str, arguments: list[str]) -> Scorecard:
    """Make a patch and its scorecard in `folder`.

    Called again on a folder that an interrupted run left, it takes up where that one stopped.

    Args:
        cfg: the composed config.
        folder: the run folder; created.
        overrides: the job's overrides in one line, the run's name in W&B.
        arguments: the job's overrides one by one, for the record of the command.

    Raises:
        PolicyPatchError: in one sentence, before the expensive part wherever that is possible.
    """
    check(cfg)
    quiet_libraries()
    started = datetime.now(UTC)
    reset_counters()
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    _refuse_foreign_folder(folder, resolved)
    (folder / FAILED).unlink(missing_ok=True)  # an earlier attempt's
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.trainer.threads is not None:
        torch.set_num_threads(cfg.trainer.threads)
    clock = Clock()
    tracker = open_tracker(cfg.logger, folder, cfg.name, overrides, resolved)
    status = 1
    try:
        with clock("load"):
            ready = prepare(cfg)
            write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved)))
        arms, pair_set, training = [Arm("base")], None, None
        if isinstance(ready.method, Trained):
            pair_set = _trained_arms(cfg, ready, ready.method, arms, clock, tracker, folder)
            training = Training.sum([stage_cost(folder, stage) for stage in ("sft", "dpo")], cfg.trainer.devices)
        elif isinstance(ready.method, Untrained) and (arm := ready.method.arm(ready.teacher)) is not None:
            arms.append(arm)
        with tracker.job("eval") as job:
            scorecard = _measured(cfg, ready, arms, training, clock, folder)
            if pair_set is not None:
                job.reads(folder / "pairs.jsonl", pair_set.counts)
                with clock("package"):
                    made = (ready.risk.name, pair_set, scorecard, resolved, started)
                    package(cfg, ready.base, arms[-1], *made, folder)
            write_json(folder / "run.json", record(started, clock.seconds, pair_set, arguments))
            write_report(folder)
            job.finds(scorecard, folder)
        status = 0
    finally:
        tracker.close(status)
    say(scorecard, folder, cfg.evaluate.level)
    return scorecard


def _trained_arms(
    cfg: DictConfig, ready: Prepared, method: Trained, arms: list[Arm], clock: Clock, tracker: Tracker, folder: Path
) -> PairSet:
    """Pairs, then both stages; adds an arm for each to `arms`. Returns the pairs."""
    base = ready.base
    with clock("pairs"):
        context = _teacher_context(cfg, base, ready.risk)
        pair_set = _pairs(context, ready.own, ready.teacher)
        save_pairs(folder / "pairs.jsonl", pair_set.pairs)
        examples = _encoded(cfg, base, pair_set)
    backbone = method.start(base, cfg.seed, cfg.row_tokens)
    if cfg.sft.enabled:
        with clock("sft"):
            data = _data(cfg, cfg.sft, examples, backbone, 1)
            sft = SFTModule(backbone, optimisation(cfg.sft), _weights(cfg))
            with tracker.job("sft") as job:
                job.reads(folder / "pairs.jsonl", pair_set.counts)
                run_stage(sft, data, cfg.sft, cfg.trainer, folder, job.loggers())
            arms.append(method.arm("sft"))
    if cfg.dpo.enabled:
        with clock("dpo"):
            reference = _reference(cfg, context, arms[-1], ready.teacher, pair_set, examples)
            data = _data(cfg, cfg.dpo, examples, backbone, 2, reference)
            preference = PreferenceSettings(cfg.dpo.beta, cfg.dpo.nll_weight, cfg.dpo.label_smoothing)
            dpo = DPOModule(backbone, optimisation(cfg.dpo), preference, _weights(cfg))
            with tracker.job("dpo") as job:
                job.reads(folder / "pairs.jsonl", pair_set.counts)
                run_stage(dpo, data, cfg.dpo, cfg.trainer, folder, job.loggers())
            arms.append(method.arm(method.name))
    return pair_set


class Clock:
    """Seconds of each part of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a part and say that it started."""
        log.info("%s ...", part)
        start = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - start, 2)


def _refuse_foreign_folder(folder: Path, resolved: Any) -> None:
    """Refuse a folder that holds a run of another configuration."""
    path = folder / "config.yaml"
    # Where a run is logged changes nothing in it, and it may be resumed with another logger.
    if path.is_file() and _but_logger(OmegaConf.load(path)) != _but_logger(resolved):
        raise ForeignFolder(f"{folder} holds a run of another configuration: choose another name=, or remove it")


def _but_logger(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(config).items() if key != "logger"}


def _teacher_context(cfg: DictConfig, base: Base, risk: Any) -> TeacherContext:
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


def _pairs(context: TeacherContext, own: list[Probe], teacher: Teacher) -> PairSet:
    """The teacher's pairs, made once for everything they depend on."""
    evaluation = {normalise(prompt) for probe in own if isinstance(probe, SampledProbe) for prompt in probe.prompts}
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
    cached = entry("pairs", content_key(**about), build, about=shown)
    pair_set = PairSet.read(cached / "pairs.jsonl", cached / "counts.json")
    log.info("%d pairs (%s)", len(pair_set.pairs), pair_set.counts)
    return pair_set


def _encoded(cfg: DictConfig, base: Base, pair_set: PairSet) -> list[Example]:
    """The pairs as token ids."""
    eos, limits = next(iter(base.eos), None), (cfg.data.max_prompt_tokens, cfg.data.max_completion_tokens)
    return [encode_pair(pair, base.encode_prompt, base.encode, eos, *limits) for pair in pair_set.pairs]


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
    context: TeacherContext,
    last: Arm,
    teacher: Teacher,
    pair_set: PairSet,
    examples: list[Example],
) -> Tensor:
    """(rows, 2) log-probabilities under the teacher, the last arm (that of stage 1), or the base.

    NaN where a row states no preference.
    """
    preferred = [i for i, e in enumerate(examples) if e.kind in IN_BATCH and len(e.item.completions) == 2]
    items = [examples[i].item for i in preferred]
    if cfg.dpo.reference == "teacher":
        found = teacher.likelihood(context, [pair_set.pairs[i] for i in preferred], items)
    else:
        arm = Arm("base") if cfg.dpo.reference == "base" else last
        with arm.on(context.base) as asked:
            found = item_logprobs(asked, arm.vectors, items, cfg.row_tokens)
    reference = torch.full((len(examples), 2), torch.nan)
    reference[preferred] = found.cpu()
    return reference


def _measured(
    cfg: DictConfig, ready: Prepared, arms: list[Arm], training: Training | None, clock: Clock, folder: Path
) -> Scorecard:
    """Ask the first arm, the last one, and that between the stages if that is asked for; then what the last costs."""
    settings = Settings(cfg.evaluate.level, cfg.evaluate.resamples)
    bench = Bench(ready.base, ready.scorer, cfg.scorer.name, _plan(cfg), settings)
    asked = arms if cfg.evaluate.after_sft else [arms[0], *arms[1:][-1:]]
    with clock("evaluate"):
        scorecard = evaluate_arms(bench, ready.own, ready.others, ready.teacher.filter_judges, asked, folder)
    if len(arms) > 1:
        with clock("costs"):
            scorecard += size_rows(arms[-1], ready.base, training)
            try:
                scorecard += latency_rows(arms[-1], ready.base, _loads(cfg), cfg.evaluate.costs.repeats)
            except RuntimeError as error:  # a GPU without room for the largest batch must not cost the patch
                log.warning("answering was not timed: %s", error)
            scorecard.save(folder / "scorecard.json")
    return scorecard


def _loads(cfg: DictConfig) -> list[Load]:
    """What arms answer to be timed."""
    costs = cfg.evaluate.costs
    return [Load(prompt, batch) for prompt in costs.prompts for batch in costs.batches]


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
