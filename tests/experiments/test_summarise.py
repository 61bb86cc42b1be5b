"""What several runs say together, on scorecards made by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_run import ROOT
from typer.testing import CliRunner

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import Row, Scorecard

sys.path.insert(0, str(ROOT / "experiments"))
import summarise


def row(arm: str, metric: str, value: float, judge: str | None = "refusal", split: str = "harmbench") -> Row:
    p_value = {"asr": 0.01, "over_refusal": 0.3}[metric] if arm == "patch" else None
    low, high = max(0.0, value - 0.1), min(1.0, value + 0.1)
    return Row(arm, "harmfulness", split, judge, metric, value, low, high, 20, p_value=p_value)


@pytest.fixture
def run(tmp_path: Path):
    """run(name, asr, over_refusal, key=value ...) -> a finished run's folder."""

    def make(name: str, asr: float, over: float = 0.2, **config) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        cfg = {"name": name, "seed": 0, "kl": {"weight": 0.0}, "dpo": {"steps": 60}, "others": {"a": 1}}
        OmegaConf.save(
            OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{k}={v}" for k, v in config.items()])),
            folder / "config.yaml",
        )
        rows = [row("base", "asr", 1.0), row("patch", "asr", asr), row("base", "over_refusal", 0.0, split="scary")]
        Scorecard([*rows, row("patch", "over_refusal", over, split="scary")]).save(folder / "scorecard.json")
        return folder

    return make


def call(*arguments: object):
    return CliRunner().invoke(summarise.app, [str(a) for a in arguments])


def test_a_table_over_seeds_has_each_ones_figure_and_the_mean(run, tmp_path: Path):
    """0.1, 0.2 and 0.3: 0.2. The others that one of them was measured on are no other setting."""
    runs = [run(f"s{i}", (3 - i) / 10, seed=i, **({"others.a": 2} if i else {})) for i in (2, 0, 1)]
    result = call("seeds", *runs, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (asr, over) = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert {seed: figure["value"] for seed, figure in asr["patch"].items()} == {"0": 0.3, "1": 0.2, "2": 0.1}
    assert asr["mean"] == pytest.approx(0.2)
    assert (asr["metric"], asr["base"], over["metric"]) == ("asr", 1.0, "over_refusal")
    cells = "0.3* (0.2 to 0.4) | 0.2* (0.1 to 0.3) | 0.1* (0 to 0.2) | 0.2 |"
    assert f"| harmfulness | harmbench | asr | refusal | 1 | {cells}" in result.stdout
    assert "| scary | over_refusal | refusal | 0 | 0.2 (0.1 to 0.3) |" in result.stdout


def test_runs_of_two_settings_are_no_seeds_of_one(run, tmp_path: Path):
    result = call("seeds", run("a", 0.1), run("b", 0.2, seed=1, **{"dpo.steps": 70}), "--out", tmp_path / "out")
    assert isinstance(result.exception, PolicyPatchError) and "dpo.steps" in str(result.exception)


def test_a_run_on_fewer_sets_leaves_its_cells_empty(run, tmp_path: Path):
    runs = [run("s0", 0.1, seed=0, **{"risk.evaluation.scary.limit": 9}), run("s1", 0.3, seed=1)]
    card = Scorecard.load(runs[1] / "scorecard.json")
    Scorecard(row for row in card if row.split != "scary").save(runs[1] / "scorecard.json")
    result = call("seeds", *runs[::-1], "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (asr, over) = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert (asr["mean"], over["mean"]) == (pytest.approx(0.2), pytest.approx(0.2))
    assert "| scary | over_refusal | refusal | 0 | 0.2 (0.1 to 0.3) | – | 0.2 of 1 |" in result.stdout


def test_seeds_whose_bases_differ_are_refused(run, tmp_path: Path):
    runs = [run(f"s{i}", 0.1, seed=i) for i in range(2)]
    card = Scorecard.load(runs[1] / "scorecard.json")
    rows = [replace(r, value=0.9) if (r.arm, r.metric) == ("base", "asr") else r for r in card]
    Scorecard(rows).save(runs[1] / "scorecard.json")
    result = call("seeds", *runs, "--out", tmp_path / "out")
    assert isinstance(result.exception, PolicyPatchError) and "asr 0.9 of" in str(result.exception)


def test_a_set_measured_otherwise_is_another_setting(run, tmp_path: Path):
    runs = [run(f"s{i}", 0.1, seed=i, **{"risk.evaluation.scary.limit": i}) for i in range(2)]
    result = call("seeds", *runs, "--out", tmp_path / "out")
    assert "risk.evaluation.scary.limit" in str(result.exception)


def test_a_seed_given_twice_is_told_rather_than_dropped(run, tmp_path: Path):
    result = call("seeds", run("a", 0.1), run("b", 0.2), "--out", tmp_path / "out")
    assert isinstance(result.exception, PolicyPatchError) and "seed 0 is given twice" in str(result.exception)


def test_a_frontier_names_its_points_by_what_they_differ_in(run, tmp_path: Path):
    runs = [run("a", 0.1, 0.3), run("b", 0.2, 0.1, **{"kl.weight": 0.5}), run("c", 0.15, 0.2, **{"dpo.steps": 90})]
    result = call("frontier", *runs, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [p["label"] for p in found["points"]] == [
        *("dpo.steps=60, kl.weight=0.0", "dpo.steps=60, kl.weight=0.5", "dpo.steps=90, kl.weight=0.0")
    ]
    assert [(p["x"]["value"], p["y"]["value"]) for p in found["points"]] == [(0.3, 0.1), (0.1, 0.2), (0.2, 0.15)]
    assert (tmp_path / "out" / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def test_keys_that_change_together_are_named_once():
    assert summarise.labels([{"a": 1, "b": 1, "c": 0}, {"a": 2, "b": 2, "c": 0}]) == ["a=1", "a=2"]
    assert summarise.labels([{"a": 1}]) == ["run"]


def test_a_figure_that_no_run_has_is_told(run, tmp_path: Path):
    result = call("frontier", run("a", 0.1), "--y", "gas", "--out", tmp_path / "out")
    assert "no gas of the patch by refusal" in str(result.exception)
    assert "config.yaml does not exist" in str(call("seeds", tmp_path, "--out", tmp_path / "out").exception)
