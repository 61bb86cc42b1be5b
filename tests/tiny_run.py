"""What the tests of whole runs share: a judge without a model behind it, prompts, and the overrides of a tiny run.

Not a conftest, because runs started by a test import the judge by its name (`_target_: tiny_run.HashJudge`).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig

from policypatch.evaluate.judges.base import BaseJudge

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


def write_prompts(path: Path, count: int, start: int = 0) -> Path:
    """Texts of four words that differ from each other."""
    rows = [
        {"text": " ".join(WORDS[(i * step + i // 12) % len(WORDS)] for step in (1, 3, 5, 7)) + f" {i}"}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overrides(base: Path, prompts: Path, **changes: Any) -> list[str]:
    """The command line of a run that takes a second or two; nothing in it is left to the defaults that matter.

    `prompts` is a folder that gets the two prompt files. A change replaces the value of its key ("__" for ".").
    """
    train, evaluation = prompts / "train.jsonl", prompts / "evaluation.jsonl"
    write_prompts(train, 12)
    write_prompts(evaluation, 8, start=100)
    values: dict[str, Any] = {
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
        "risk.train.source": train,
        "risk.evaluation.source": evaluation,
        "risk.judges.svm._target_": "tiny_run.HashJudge",
        "+risk.judges.svm.name": "svm",
        "~risk.judges.bilstm": None,
        "+risk.judges.other": "{_target_:tiny_run.HashJudge,name:other,salt:x}",
        "teacher.n": 6,
        "teacher.judges": "[other]",
        "teacher.sampling": "{temperature:1.0,top_p:0.9,max_new_tokens:8,min_new_tokens:0}",
        "teacher.filter": "{margin:0.3,chosen_at_most:0.4,rejected_at_least:0.5,min_tokens:2,max_repetition:0.5}",
        "patch.length": 3,
        "data.max_prompt_tokens": 64,
        "data.max_completion_tokens": 16,
        "data.held_out": 0.2,
        "sft.steps": 4,
        "sft.batch_size": 4,
        "dpo.steps": 5,
        "dpo.batch_size": 4,
        "evaluate.prompts": "null",
        "evaluate.k": 3,
        "evaluate.ppl_samples": 2,
        "evaluate.resamples": 100,
        "evaluate.sampling": "{temperature:1.0,top_p:0.9,max_new_tokens:8,min_new_tokens:0}",
        "decode_rows": 32,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    kept = {key: value for key, value in values.items() if value is not DROP}
    return [key if value is None else f"{key}={value}" for key, value in kept.items()]


def composed(arguments: list[str]) -> DictConfig:
    """The config that run.py would get."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("config", overrides=arguments)
