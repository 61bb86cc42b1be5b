"""A stage is trained once for the same settings: its files, its figures, and who hears of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from policypatch.model.backbone import PrefixBackbone
from policypatch.train import shared
from policypatch.train.shared import trained_once

FIGURES = "stage,step,metric,value\nsft,1,train/loss,2\nsft,2,train/loss,1.5\nsft,2,val/loss,1.25\n"


class Heard:
    """A logger."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.steps.append((step, metrics))


@pytest.fixture
def go(tiny_llama, tmp_path: Path):
    """go(folder, about) -> how often it was trained, and what a logger heard that the training itself did not tell."""

    def run(name: str, about: dict[str, Any], start: float = 0.0) -> tuple[int, Heard]:
        backbone, heard, counts = PrefixBackbone(tiny_llama, torch.full((2, 64), start)), Heard(), []
        folder = tmp_path / name
        last = folder / "checkpoints" / "sft" / "last.ckpt"

        def train() -> None:
            if last.is_file():
                return
            counts.append(1)
            last.parent.mkdir(parents=True, exist_ok=True)
            last.write_bytes(b"tensors")
            (last.parent / "cost.json").write_text('{"seconds": 3.0, "peak_bytes": 7}')
            (folder / "metrics.csv").write_text(FIGURES)

        trained_once("sft", folder, about, backbone, train, [heard])
        assert last.read_bytes() == b"tensors"
        return len(counts), heard

    return run


def test_files_and_figures_come_from_the_first_run(go, tmp_path: Path):
    first, told = go("a", {"lr": 1})
    again, heard = go("b", {"lr": 1})
    assert (first, again) == (1, 0)
    assert told.steps == []  # its own training tells
    assert heard.steps == [(0, {"train/loss": 2.0}), (1, {"train/loss": 1.5}), (2, {"val/loss": 1.25})]
    for name in ("metrics.csv", "checkpoints/sft/cost.json"):
        assert (tmp_path / "b" / name).read_text().split() == (tmp_path / "a" / name).read_text().split()


def test_what_differs_is_trained_anew(go):
    assert go("a", {"lr": 1})[0] == 1
    assert go("b", {"lr": 2})[0] == 1
    assert go("c", {"lr": 1}, start=0.5)[0] == 1


def test_other_code_is_another_training(go, monkeypatch: pytest.MonkeyPatch):
    assert go("a", {"lr": 1})[0] == 1
    monkeypatch.setitem(shared.CODE, "policypatch.model", ("tree.py",))
    assert go("b", {"lr": 1})[0] == 1


def test_figures_of_a_later_stage_stay(go, tmp_path: Path):
    go("a", {"lr": 1})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.csv").write_text("stage,step,metric,value\nsft,1,train/loss,9\ndpo,1,train/loss,0.5\n")
    go("b", {"lr": 1})
    lines = (tmp_path / "b" / "metrics.csv").read_text().splitlines()
    assert lines[1] == "sft,1,train/loss,2" and lines[-1] == "dpo,1,train/loss,0.5" and len(lines) == 5


def test_a_line_that_a_kill_cut_off_is_no_figure(go, tmp_path: Path):
    go("a", {"lr": 1})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.csv").write_text("stage,step,metric,value\ndpo,1,train/loss,0.5\ndpo,2,train")
    go("b", {"lr": 1})
    assert (tmp_path / "b" / "metrics.csv").read_text().splitlines()[-1] == "dpo,1,train/loss,0.5"
