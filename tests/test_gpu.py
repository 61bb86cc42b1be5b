"""On a CUDA GPU a run does what it does on a CPU; skipped, and said so, where there is none."""

import csv
from pathlib import Path

import pytest
import torch
from tiny_run import composed, overrides, without_costs

from policypatch.files.atomic import read_jsonl
from policypatch.pipeline import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
GPU = {"trainer": "gpu", "model__device": "auto"}


@pytest.fixture
def go(tiny_base_folder: Path, tmp_path: Path):
    def start(name: str, risk: str, /, **changes):
        arguments = overrides(tiny_base_folder, tmp_path, risk, **changes)
        return without_costs(run(composed(arguments), tmp_path / name, "", arguments))

    return start


def losses(folder: Path) -> list[float]:
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [float(row["value"]) for row in rows if row["metric"] == "train/loss"]


@pytest.mark.parametrize("risk", ["toxicity", "gender_bias", "harmfulness"])
def test_a_run_has_the_losses_and_figures_of_one_on_the_cpu(risk: str, go, tmp_path: Path):
    cards = [go("cpu", risk, others="all"), go("gpu", risk, others="all", **GPU)]
    pairs = [read_jsonl(tmp_path / name / "pairs.jsonl") for name in ("cpu", "gpu")]
    assert [row["prompt"] for row in pairs[0]] == [row["prompt"] for row in pairs[1]]
    cpu, gpu = losses(tmp_path / "cpu"), losses(tmp_path / "gpu")
    assert len(cpu) > 8 and gpu == pytest.approx(cpu, rel=0.02)
    assert [(r.arm, r.risk, r.split, r.judge, r.metric) for r in cards[0]] == [
        (r.arm, r.risk, r.split, r.judge, r.metric) for r in cards[1]
    ]
    for ours, theirs in zip(*cards, strict=True):
        if ours.arm == "base":  # a token that is drawn otherwise moves a rate by a prompt
            assert theirs.value == pytest.approx(ours.value, rel=0.05, abs=1.01 / ours.n), ours


def test_adapters_and_checkpointing(go):
    go("lora", "toxicity", method="lora", **GPU)
    go("again", "harmfulness", trainer__recompute="true", kl__weight=0.5, model__dtype="bfloat16", **GPU)
