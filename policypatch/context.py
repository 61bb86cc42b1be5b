"""Whether everything that a run trains on, decodes and measures fits into the models' contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policypatch.data.teachers import SampledTeacher, Teacher
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.probes import Plan, Probe, Reading
from policypatch.model.base import Base
from policypatch.model.form import PLAIN
from policypatch.model.latency import NEW_TOKENS
from policypatch.model.parts import sliding_window
from policypatch.places import file_and_row

SCORER_TOKENS = 2  # of its own that a scorer may need for a token of the base's


def check_context(cfg: DictConfig, base: Base, vectors: int) -> None:
    """Refuse a patch or timed prompts that are too long for the base's positions."""
    if base.context is None:
        return
    trained = cfg.data.max_prompt_tokens + cfg.data.max_completion_tokens
    if vectors + trained > base.context:
        stacked = OmegaConf.select(cfg, "method.patches") is not None
        what = f"patch.length is {vectors}"
        if stacked:
            what = f"method.patches has {vectors} vectors"
        elif cfg.patch.companions:
            what = f"patch and companions have {vectors} vectors"
        raise PolicyPatchError(
            f"{what}: with prompts and completions of up to {trained} tokens it exceeds "
            f"the context of {cfg.model.name} ({base.context}); shorten {'the stack' if stacked else 'patch.length'}, "
            "data.max_prompt_tokens or data.max_completion_tokens"
        )
    if (longest := max(cfg.evaluate.costs.prompts, default=0)) and (vectors + longest + NEW_TOKENS > base.context):
        raise PolicyPatchError(
            f"evaluate.costs.prompts has {longest}: with {vectors} vectors before and {NEW_TOKENS} new tokens "
            f"after it exceeds the context of {cfg.model.name} ({base.context}); give shorter ones, [] for none"
        )


def check_prompts(cfg: DictConfig, base: Base, risk: Any, teacher: Teacher, key: str, teacher_key: str) -> None:
    """Refuse training prompts that are too long for the base's positions.

    Args:
        cfg: the run's config.
        base: what reads them.
        risk: whose they are.
        teacher: what responds to them.
        key: where the risk stands in the config.
        teacher_key: where the teacher does.
    """
    if new := OmegaConf.select(cfg, f"{teacher_key}.sampling.max_new_tokens"):
        # Guidance makes a teacher's prompts longer than the base's; where there is none they are the same.
        form = teacher.form(risk.form) if isinstance(teacher, SampledTeacher) else risk.form
        _check(cfg, f"{key}.train", Reading(risk.training_prompts, form, new, whole=False), base, 0)
        _check(cfg, f"{key}.benign", Reading(risk.benign_prompts, form, new, whole=False), base, 0)
        _check(cfg, f"{key}.benign_texts", Reading(risk.benign_texts, PLAIN, new, whole=False), base, 0)


def check_readings(
    cfg: DictConfig,
    keys: Mapping[str, str],
    probes: Sequence[Probe],
    plan: Plan,
    base: Base,
    scorer: Base,
    vectors: int,
) -> None:
    """Refuse texts of the evaluation that are too long for base and patch, or for the scorer.

    Args:
        cfg: the run's config.
        keys: where the risks that are trained against stand in it, by name; others stand below `others`.
        probes: of all risks.
        plan: how arms are asked.
        base: what reads them.
        scorer: what perplexity is measured with.
        vectors: that stand before them.
    """
    for probe in probes:
        for reading in probe.readings(plan):
            key = _key(cfg, keys.get(probe.risk, f"others.{probe.risk}"), probe.split)
            _check(cfg, key, reading, *((scorer, 0) if reading.by_scorer else (base, vectors)), scorer is base)


def _key(cfg: DictConfig, section: str, split: str) -> str:
    """Where a set stands in the config; of one that is made of several keys its name."""
    for key in (f"{section}.evaluation.{split}", f"{section}.{split}"):
        if OmegaConf.select(cfg, key) is not None:
            return key
    return f"{section} ({split})"


def _check(cfg: DictConfig, what: str, reading: Reading, reader: Base, vectors: int, one_model: bool = True) -> None:
    window = sliding_window(reader.model) if reading.whole else None
    limit = min((n for n in (reader.context, window) if n is not None), default=None)
    if limit is None or not reading.texts:
        return
    # A text that is scored whole has the start token before it, also where the tokenizer puts none there.
    before = len(reader.start) if reading.whole and not reading.new and not reader.encode_prompt("") else 0
    new = reading.new * (1 if one_model or not reading.by_scorer else SCORER_TOKENS)
    lengths = [before + len(reader.encode_prompt(text, reading.form)) for text in reading.texts]
    longest = max(lengths)
    if vectors + longest + new > limit:
        role, remedy = ("scorer ", ", or take another scorer=") if reading.by_scorer else ("", "")
        after = f" and {new} tokens after it" if new else ""
        number = lengths.index(longest)
        section = OmegaConf.select(cfg, what.partition(" (")[0])
        place = file_and_row(section, reading.texts[number]) or f"number {number + 1}"
        raise PolicyPatchError(
            f"{what} has a text of {longest} tokens ({place}): with {vectors} vectors "
            f"before{after} it exceeds the context of {role}{reader.identity.id} ({limit}); shorten it{remedy}"
        )
