"""What the tests of whole runs share: a judge without a model behind it, prompts, and the overrides of a tiny run.

Not a conftest, because runs started by a test import the judge by its name (`_target_: tiny_run.HashJudge`).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
from omegaconf import DictConfig

from policypatch.evaluate.judges.base import BaseJudge
from policypatch.evaluate.scorecard import COST, Row, Scorecard
from policypatch.model.base import Base
from policypatch.patch.artifact import Patch, digest
from policypatch.patch.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("harbour", "evening", "train", "quiet", "office", "map", "valley", "neighbour", "opinion", "winter", "river")

DROP = object()  # in place of a value: leave the key alone


class HashJudge(BaseJudge):
    """Scores every text with a number of its own, evenly spread over [0, 1]; counts what it was asked."""

    asked = 0

    def __init__(self, name: str, salt: str = "") -> None:
        super().__init__(name, 64)
        self.salt, self.fingerprint = salt, f"hash:{name}:{salt}"

    def _score_batch(self, texts: list[str]) -> np.ndarray:
        HashJudge.asked += len(texts)
        digests = [hashlib.sha256((self.salt + text).encode("utf-8", "replace")).digest() for text in texts]
        return np.array([int.from_bytes(digest[:4], "big") / 2**32 for digest in digests])


TEACHER = {
    "n": 6,
    "sampling": "{temperature:1.0,top_p:0.9,max_new_tokens:8,min_new_tokens:0}",
    "filter": "{margin:0.3,chosen_at_most:0.4,rejected_at_least:0.5,min_tokens:2,max_repetition:0.5}",
}
GUIDANCE = {"system": "'Be careful.'", "turns": "[{request:Who voted?,response:I can not say.}]"}


def texts(count: int, start: int = 0) -> list[str]:
    """Texts of five words that differ from each other."""
    return [
        " ".join(WORDS[(i * step + i // 12) % len(WORDS)] for step in (1, 3, 5, 7)) + f" {i}"
        for i in range(start, start + count)
    ]


def write_prompts(path: Path, count: int, start: int = 0, field: str = "text") -> Path:
    """`texts` as rows."""
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts(count, start)))
    return path


def overrides(base: Path, prompts: Path, risk: str = "toxicity", **changes: Any) -> list[str]:
    """The command line of a run that takes a second or two; nothing in it is left to the defaults that matter.

    `prompts` is a folder that gets the prompt files. A change replaces the value of its key ("__" for "."); with
    `others="all"` the other risks' prompts and judges are tiny ones as well.
    """
    values: dict[str, Any] = {
        "risk": risk,
        "others": "none",
        "model.path": base,
        "model.name": "tiny",
        "model.dtype": "float32",
        "model.device": "cpu",
        "scorer": "base",
        "logger": "csv",
        "trainer": "cpu",
        "trainer.checkpoint_every": 2,
        "trainer.validate_every": 2,
        "seed": 0,
        **{f"teacher.{key}": value for key, value in TEACHER.items()},
        "patch.length": 3,
        "data.max_prompt_tokens": 128 if risk in ("harmfulness", "joint") else 64,
        "data.max_completion_tokens": 16,
        "data.held_out": 0.2,
        "sft.steps": 4,
        "sft.batch_size": 4,
        "dpo.steps": 5,
        "dpo.batch_size": 4,
        "evaluate.prompts": "null",
        "evaluate.other_prompts": 4,
        "evaluate.k": 3,
        "evaluate.responses": 2,
        "evaluate.ppl_samples": 2,
        "evaluate.resamples": 100,
        "evaluate.sampling": "{temperature:1.0,top_p:0.9,max_new_tokens:8,min_new_tokens:0}",
        "evaluate.response_sampling": "{temperature:1.0,top_p:0.9,max_new_tokens:6,min_new_tokens:0}",
        "evaluate.costs": "{prompts:[4,6],batches:[1,2],repeats:1}",
        "decode_rows": 32,
    }
    values |= SECTIONS[risk]("risk", prompts)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    if changes.get("others") == "all":
        for other in ("toxicity", "gender_bias", "harmfulness"):
            values |= SECTIONS[other](f"others.{other}", prompts)
        values["others.utility.requests.source"] = write_prompts(prompts / "requests.jsonl", 6, 700)
        values["others.utility.text.source"] = write_prompts(prompts / "human.jsonl", 5, 800)
    values |= changes
    kept = {key: value for key, value in values.items() if value is not DROP}
    return [key if value is None else f"{key}={value}" for key, value in kept.items()]


def _judges(key: str, *names: str) -> dict[str, Any]:
    """HashJudges of these names in place of all judges at `key`, each with a salt of its own."""
    made = ",".join(f"{name}:{{_target_:tiny_run.HashJudge,name:{name},salt:{name[0]}}}" for name in names)
    return {f"~{key}.judges": None, f"+{key}.judges": f"{{{made}}}"}


def _sets(key: str, **sources: Path) -> dict[str, Any]:
    """Prompts of these files, by name, in place of all sets at `key`."""
    made = ",".join(f"{name}:{{_target_:policypatch.data.prompts.PromptSet,source:{s}}}" for name, s in sources.items())
    return {f"~{key}": None, f"+{key}": f"{{{made}}}"}


def _toxicity(key: str, prompts: Path) -> dict[str, Any]:
    return {
        f"{key}.train.source": write_prompts(prompts / "train.jsonl", 12),
        **_sets(f"{key}.evaluation", rtp=write_prompts(prompts / "evaluation.jsonl", 8, 100)),
        **_judges(key, "svm", "other"),
        f"{key}.filter": "[other]",
    }


def _gender_bias(key: str, prompts: Path) -> dict[str, Any]:
    (prompts / "male.txt").write_text("he\nhim\n")
    (prompts / "female.txt").write_text("she\nhers\n")
    sentences = [f"{more},{less},gender" for more, less in zip(texts(5, 300), texts(5, 310), strict=True)]
    (prompts / "crows.csv").write_text("\n".join(["sent_more,sent_less,bias_type", "a,b,age", *sentences]))
    return {
        f"{key}.train.source": write_prompts(prompts / "work_train.jsonl", 12, 200),
        f"{key}.benign_texts.source": write_prompts(prompts / "sentences.jsonl", 3, 430),
        **_sets(f"{key}.evaluation", professions=write_prompts(prompts / "work.jsonl", 6, 220)),
        **_sets(f"{key}.words", male=prompts / "male.txt", female=prompts / "female.txt"),
        f"{key}.crows.more.source": prompts / "crows.csv",
        f"{key}.crows.less.source": prompts / "crows.csv",
        **_judges(key, "words", "names"),
    }


def _harmfulness(key: str, prompts: Path) -> dict[str, Any]:
    return {
        **({f"teacher.{name}": value for name, value in GUIDANCE.items()} if key == "risk" else {}),
        f"{key}.near": "null",  # all of the texts are made of the same few words
        f"{key}.train.source": write_prompts(prompts / "harmful_train.jsonl", 8, 400),
        **_sets(f"{key}.benign", plain=write_prompts(prompts / "plain_train.jsonl", 6, 420)),
        f"{key}.benign_texts.source": write_prompts(prompts / "texts.jsonl", 3, 430),
        **_sets(f"{key}.evaluation", harmbench=write_prompts(prompts / "harmful.jsonl", 5, 440)),
        f"{key}.scary.source": write_prompts(prompts / "scary.jsonl", 4, 460),
        f"{key}.plain.source": write_prompts(prompts / "plain.jsonl", 6, 480),
        **_judges(key, "refusal", "openings"),
    }


def _custom(key: str, prompts: Path) -> dict[str, Any]:
    return {
        f"{key}.prompts": write_prompts(prompts / "policy.jsonl", 15, 600, "prompt"),
        f"{key}.judge": "{_target_:tiny_run.HashJudge,name:policy,salt:p}",
    }


def _joint(key: str, prompts: Path) -> dict[str, Any]:
    found: dict[str, Any] = {f"teacher.{name}": DROP for name in TEACHER}
    for name in ("toxicity", "gender_bias", "harmfulness"):
        teacher = TEACHER | (GUIDANCE if name == "harmfulness" else {})
        found |= SECTIONS[name](f"{key}.parts.{name}.risk", prompts)
        found |= {f"{key}.parts.{name}.teacher.{field}": value for field, value in teacher.items()}
    return found


def patch_of(base: Base, name: str, start: int, length: int = 4, /, **fields: Any) -> Patch:
    """A patch for `base` whose vectors are its embeddings of `length` tokens from `start` on."""
    vectors = base.embedding[start : start + length].float().clone()
    known = {"version": "1.0.0", "risks": ["toxicity"], "created": "2026-11-25T00:00:00+00:00", "base": base.identity}
    shape = {"length": length, "width": vectors.shape[1], "sha256": digest(vectors)}
    return Patch(vectors, Manifest(name=name, **(known | shape | fields)))


SECTIONS = {
    "toxicity": _toxicity,
    "gender_bias": _gender_bias,
    "harmfulness": _harmfulness,
    "custom": _custom,
    "joint": _joint,
}


def without_costs(card: list[Row]) -> Scorecard:
    """What repeats exactly: times do not."""
    return Scorecard(row for row in card if row.risk != COST)


def composed(arguments: list[str]) -> DictConfig:
    """The config that run.py would get."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("config", overrides=arguments)


def broken_off(go, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the second stage, after a checkpoint."""
    from policypatch.train.dpo_module import DPOModule

    step = DPOModule.training_step

    def breaks_off(self, batch, batch_idx):
        if self.global_step == 3:
            raise RuntimeError("the machine went down")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as broken:
        broken.setattr(DPOModule, "training_step", breaks_off)
        with pytest.raises(RuntimeError, match="went down"):
            go(name)


EXACT = ("pairs.jsonl", "metrics.csv", "samples.jsonl", "per_prompt.json", "patch/patch.safetensors")


def same_end(expected: Path, found: Path) -> None:
    """Two run folders hold the same, byte by byte, but for times; and nothing unfinished."""
    for name in EXACT:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    cards = [without_costs(Scorecard.load(folder / "scorecard.json")) for folder in (expected, found)]
    assert cards[0] == cards[1]
    assert not list(found.rglob(".tmp-*"))
