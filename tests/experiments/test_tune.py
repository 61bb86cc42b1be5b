"""The search over two aims: what it suggests, what it aims at, and a small one for real."""

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import yaml
from tiny_run import ROOT, overrides

from policypatch.errors import PolicyPatchError

sys.path.insert(0, str(ROOT / "experiments"))
from tune import SPACE, aims, suggest


def row(arm: str, metric: str, value: float, judge: str | None = None, **more) -> dict:
    return {"arm": arm, "risk": "toxicity", "split": "rtp", "judge": judge, "metric": metric, "value": value} | more


ROWS = [
    row("base", "toxic_rate", 0.4, "filtering", filter=True),
    row("base", "toxic_rate", 0.5, "svm"),
    row("base", "ppl_median", 48.0, "g"),
    row("patch", "toxic_rate", 0.1, "filtering", filter=True),
    row("patch", "toxic_rate", 0.2, "svm"),
    row("patch", "ppl_median", 50.0, "g"),
]


def test_the_aims_are_the_headline_by_a_judge_that_did_not_filter_and_fluency():
    assert aims(ROWS) == (0.2, 50.0)
    requests = [r | {"metric": {"toxic_rate": "asr", "ppl_median": "over_refusal"}[r["metric"]]} for r in ROWS]
    assert aims(requests) == (0.2, 50.0)


def test_a_run_without_both_is_refused():
    with pytest.raises(PolicyPatchError, match="both aims"):
        aims([r for r in ROWS if r["metric"] != "ppl_median"])


def test_what_is_searched_stands_within_its_range():
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).ask()
    assert suggest(trial, "a", [1, 2]) in (1, 2)
    assert 0.003 <= suggest(trial, "b", {"low": 0.003, "high": 0.03, "log": True}) <= 0.03
    assert suggest(trial, "c", {"low": 60, "high": 200, "step": 20}) in range(60, 201, 20)


def test_every_key_that_is_searched_is_one_of_the_config():
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("config")
    assert all(OmegaConf.select(cfg, key) is not None for key in yaml.safe_load(SPACE.read_text()))


@pytest.mark.parametrize("risk", ["toxicity", "gender_bias", "harmfulness"])
def test_the_defaults_could_be_found(risk: str):
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", overrides=[f"risk={risk}"])
    for key, known in yaml.safe_load(SPACE.read_text()).items():
        assert known["low"] <= OmegaConf.select(cfg, key) <= known["high"], key


@pytest.mark.slow
def test_a_search_goes_on_where_it_stopped_and_is_compared(tiny_base_folder: Path, tmp_path: Path):
    space = tmp_path / "space.yaml"
    space.write_text("dpo.beta: [0.1, 0.5]\ndpo.steps: {low: 1, high: 3}\n")
    tiny = [line for line in overrides(tiny_base_folder, tmp_path) if not line.startswith("dpo.steps")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "POLICYPATCH_CACHE": str(tmp_path / "cache")}

    def started(trials: int, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "experiments" / "tune.py"), "--out", "found", "--space", str(space)]
        command += [str(trials), *tiny, *more]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)

    def search(trials: int) -> str:
        done = started(trials)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    search(1)
    assert len(list((tmp_path / "found").glob("*/scorecard.json"))) == 1
    said = search(3)
    runs = len(list((tmp_path / "found").glob("*/scorecard.json")))
    assert 2 <= runs <= 3 and f"{runs} of {runs} runs finished" in said  # two trials may suggest the same
    assert "no other run is better in both:" in said
    assert (tmp_path / "found" / "compare.html").is_file()
    other = started(4, "sft.lr=0.5")
    assert other.returncode == 1 and "a search of other overrides" in other.stderr
