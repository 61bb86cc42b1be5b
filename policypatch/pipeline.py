"""One run, read top to bottom: pairs -> SFT -> DPO -> evaluate -> package -> report."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from policypatch.data.datamodule import PairData, encode_pair
from policypatch.data.pairs import save_pairs
from policypatch.data.prompts import normalise
from policypatch.data.teachers import PairSet, Teacher, TeacherContext
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.arms import SamplingPlan, evaluate_arms
from policypatch.evaluate.scorecard import Scorecard
from policypatch.files.atomic import read_json, write_json, write_text
from policypatch.files.cache import content_key, counters, entry, reset_counters
from policypatch.logs import quiet_libraries
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.sampling import Sampling
from policypatch.model.tree import Item
from policypatch.patch import artifact, initialise
from policypatch.patch.manifest import Manifest
from policypatch.patch.peft_layout import save_peft
from policypatch.prepare import prepare
from policypatch.report.headline import headline
from policypatch.report.run_report import write_report
from policypatch.report.table import scorecard_table
from policypatch.report.tracking import Tracker, open_tracker
from policypatch.settings import check
from policypatch.train.dpo_module import DPOModule, PreferenceSettings
from policypatch.train.reference import reference_logprobs
from policypatch.train.sft_module import SFTModule
from policypatch.train.stage import optimisation, run_stage

log = logging.getLogger(__name__)

PACKAGES = ("policypatch", "lightning", "torch", "transformers", "hydra-core", "peft", "torchmetrics", "datasets")


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
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    clock = Clock()
    tracker = open_tracker(cfg.logger, folder, cfg.name, overrides, resolved)
    status = 1
    try:
        with clock("load"):
            base, scorer, risk, teacher = prepare(cfg)
            write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved)))
        with clock("pairs"):
            pair_set = _pairs(cfg, base, risk, teacher)
            save_pairs(folder / "pairs.jsonl", pair_set.pairs)
            eos = next(iter(base.eos), None)
            items = [
                encode_pair(
                    pair,
                    base.encode_prompt,
                    base.encode,
                    eos,
                    cfg.data.max_prompt_tokens,
                    cfg.data.max_completion_tokens,
                )
                for pair in pair_set.pairs
            ]
        arms: dict[str, Tensor | None] = {"base": None}
        backbone = PrefixBackbone(base.model, _initial_vectors(cfg, base), cfg.row_tokens)
        if cfg.sft.enabled:
            with clock("sft"):
                arms["sft"] = _sft(cfg, backbone, items, folder, tracker)
        if cfg.dpo.enabled:
            with clock("dpo"):
                arms["patch"] = _dpo(cfg, base, backbone, items, folder, tracker)
        with clock("evaluate"):
            plan = SamplingPlan(
                cfg.evaluate.k,
                cfg.evaluate.seed,
                Sampling(**cfg.evaluate.sampling),
                cfg.evaluate.ppl_samples,
                cfg.decode_rows,
            )
            scorecard = evaluate_arms(base, scorer, cfg.scorer.name, risk, teacher.filter_judges, arms, plan, folder)
        with clock("package"):
            _package(cfg, base, arms, risk, pair_set, scorecard, resolved, started, folder)
        write_json(folder / "run.json", _record(started, clock, pair_set, arguments))
        write_report(folder)
        tracker.finish_run(scorecard, folder)
        status = 0
    finally:
        tracker.close(status)
    _say(scorecard, folder, cfg.evaluate.level)
    return scorecard


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
        raise PolicyPatchError(f"{folder} holds a run of another configuration: choose another name=, or remove it")


def _but_logger(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(config).items() if key != "logger"}


def _pairs(cfg: DictConfig, base: Base, risk: Any, teacher: Teacher) -> PairSet:
    """The teacher's pairs, made once for everything they depend on."""
    evaluation = {normalise(prompt) for prompt in risk.evaluation_prompts}
    context = TeacherContext(base, risk.training_prompts, risk.judges, cfg.seed, cfg.decode_rows)
    about = teacher.identity() | {
        "base": asdict(base.identity),
        "dtype": str(base.model.dtype),
        "prompts": list(context.prompts),
        "judge_fingerprints": {
            name: judge.fingerprint for name, judge in risk.judges.items() if name in teacher.filter_judges
        },
        "seed": cfg.seed,
        "eos": list(base.eos),
        "evaluation": sorted(evaluation),
    }

    def build(target: Path) -> None:
        made = teacher.pairs(context).without(evaluation)
        if not made.pairs:
            raise PolicyPatchError(
                f"no pair passed teacher.filter ({made.counts}): loosen its thresholds, raise teacher.n or give more "
                "prompts"
            )
        save_pairs(target / "pairs.jsonl", made.pairs)
        write_json(target / "counts.json", made.counts)

    cached = entry("pairs", content_key(**about), build, about={k: v for k, v in about.items() if k != "prompts"})
    pair_set = PairSet.read(cached / "pairs.jsonl", cached / "counts.json")
    log.info("%d pairs (%s)", len(pair_set.pairs), pair_set.counts)
    return pair_set


def _initial_vectors(cfg: DictConfig, base: Base) -> Tensor:
    """The patch before training, by `init.kind`."""
    length, init = cfg.patch.length, cfg.init
    if init.kind == "text":
        return initialise.from_text(base.embedding, base.encode(init.text), length)
    if init.kind == "vocab":
        return initialise.from_vocab(base.embedding, length, cfg.seed)
    return initialise.from_random(base.embedding, length, cfg.seed, init.scale)


def _sft(cfg: DictConfig, backbone: PrefixBackbone, items: list[Item], folder: Path, tracker: Tracker) -> Tensor:
    """Stage 1; returns the patch after it."""
    data = PairData(items, cfg.sft.batch_size, cfg.sft.steps, cfg.seed, 1, backbone.tree, None, cfg.data.held_out)
    module = SFTModule(backbone, optimisation(cfg.sft))
    run_stage(module, data, cfg.sft, cfg.trainer, folder, tracker.loggers("sft"))
    return backbone.patch.detach().clone()


def _dpo(
    cfg: DictConfig, base: Base, backbone: PrefixBackbone, items: list[Item], folder: Path, tracker: Tracker
) -> Tensor:
    """Stage 2; returns the final patch."""
    # The reference is this backbone's own patch as it is now, after stage 1, or no patch at all; a teacher's own
    # likelihood is refused in `prepare`.
    reference_patch = backbone.patch.detach()[:0] if cfg.dpo.reference == "base" else backbone.patch.detach().clone()
    reference = reference_logprobs(base, reference_patch, items, cfg.row_tokens)
    data = PairData(items, cfg.dpo.batch_size, cfg.dpo.steps, cfg.seed, 2, backbone.tree, reference, cfg.data.held_out)
    preference = PreferenceSettings(cfg.dpo.beta, cfg.dpo.nll_weight, cfg.dpo.kl_weight, cfg.dpo.label_smoothing)
    module = DPOModule(backbone, optimisation(cfg.dpo), preference)
    run_stage(module, data, cfg.dpo, cfg.trainer, folder, tracker.loggers("dpo"))
    return backbone.patch.detach().clone()


def _package(
    cfg: DictConfig,
    base: Base,
    arms: dict[str, Tensor | None],
    risk: Any,
    pair_set: PairSet,
    scorecard: Scorecard,
    resolved: Any,
    started: datetime,
    folder: Path,
) -> None:
    """Write the artifact: the last trained arm's vectors and what is known of them."""
    vectors = next(v for v in reversed(arms.values()) if v is not None).float().cpu()
    manifest = Manifest(
        name=cfg.patch.name.lower(),
        version=cfg.patch.version,
        risks=[risk.name],
        length=vectors.shape[0],
        width=vectors.shape[1],
        base=base.identity,
        sha256=artifact.digest(vectors),
        created=started.isoformat(timespec="seconds"),
        data_sha256=pair_set.sha256,
        training={k: v for k, v in resolved.items() if k != "logger"},
        scorecard=[asdict(row) for row in scorecard],
        packages={name: version(name) for name in PACKAGES},
    )
    patch = artifact.Patch(vectors, manifest)
    artifact.save(patch, folder / "patch")
    heads = base.model.config.num_attention_heads, base.model.config.num_hidden_layers
    save_peft(patch, folder / "peft", num_attention_heads=heads[0], num_layers=heads[1])


def _record(started: datetime, clock: Clock, pair_set: PairSet, arguments: list[str]) -> dict[str, Any]:
    return {
        "started": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "run.py", *arguments]),
        "seconds": clock.seconds,
        "versions": {name: version(name) for name in PACKAGES},
        "pairs": pair_set.counts,
        "cache": counters(),
    }


def _say(scorecard: Scorecard, folder: Path, level: float) -> None:
    """The scorecard and where everything is, for whoever waited."""
    console = Console()
    rows = [asdict(row) for row in scorecard]
    console.print(scorecard_table(rows, level))
    console.print(headline(rows, level))
    hits = read_json(folder / "run.json")["cache"]
    console.print("cache: " + ", ".join(f"{k} {v['hits']} hit {v['misses']} made" for k, v in sorted(hits.items())))
    console.print(f"run folder: {folder}", soft_wrap=True)
