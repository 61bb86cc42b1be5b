"""`policypatch audit` as it is typed, on a tiny base."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import HashJudge, overrides, patch_of, without_costs, write_prompts
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.evaluate.scorecard import Scorecard
from policypatch.model import completions
from policypatch.model.base import Base
from policypatch.patch.artifact import Patch, load, save


@pytest.fixture
def audit(tiny_base: Base, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """audit(patch's folder, *options) -> the command's result; the risk's prompts and judges are tiny ones."""
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "cache"))
    own = ("risk.", "~risk", "+risk", "scorer", "others")
    settings = [o for o in overrides(tiny_base_folder, tmp_path) if o.startswith(own)]
    settings += ["model.dtype=float32", "decode_rows=32"]

    def call(folder: Path, *options: object):
        chosen = [word for setting in settings for word in ("--set", setting)]
        arguments = ["audit", str(folder), "--model", str(tiny_base_folder), *map(str, options), *chosen]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})

    return call


@pytest.fixture
def patch(tiny_base: Base, tmp_path: Path) -> Path:
    """A patch whose manifest says how it is measured, and has no figure yet."""
    sampling = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 6, "min_new_tokens": 0}
    evaluate = {"prompts": None, "other_prompts": 4, "k": 3, "responses": 1, "seed": 7, "ppl_samples": 2, "level": 0.9}
    evaluate |= {"resamples": 100, "sampling": sampling, "response_sampling": sampling, "_target_": "os.system"}
    return save(patch_of(tiny_base, "tox", 4, training={"evaluate": evaluate}), tmp_path / "patch")


def with_scorecard(folder: Path, rows: list[dict], out: Path) -> Path:
    known = load(folder)
    return save(Patch(known.vectors, replace(known.manifest, scorecard=rows)), out)


def test_measured_again_it_is_the_same_and_a_patch_that_was_better_is_an_alarm(audit, patch: Path, tmp_path: Path):
    first = audit(patch, "--out", tmp_path / "first")
    assert first.exit_code == 0, first.output
    card = without_costs(Scorecard.load(tmp_path / "first" / "scorecard.json"))
    config = (tmp_path / "first" / "config.yaml").read_text()
    assert "k: 3" in config and "seed: 7" in config and "level: 0.9" in config and "os.system" not in config
    assert f"{len(card)} figures have no earlier one" in first.stdout

    rows = [asdict(row) | ({"arm": "patch"} if row.arm == "stack" else {}) for row in card]
    same = audit(with_scorecard(patch, rows, tmp_path / "same"), "--out", tmp_path / "second")
    assert same.exit_code == 0, same.output
    assert f"none of {len(card)} figures changed since" in same.stdout

    for row in rows:
        if row["arm"] == "patch" and (row["metric"], row["judge"]) == ("amt", "svm"):
            row.update(value=0.01, low=0.009, high=0.011)
    worse = audit(with_scorecard(patch, rows, tmp_path / "worse"), "--out", tmp_path / "third")
    assert worse.exit_code == 3, worse.output
    assert "! patch: toxicity rtp amt by svm: 0.01 -> " in worse.stdout
    assert f"1 of {len(card)} figures changed since" in worse.stdout
    # Of other figures it is no alarm: the worst of two samples is not that of three.
    fewer = audit(tmp_path / "worse", "--out", tmp_path / "fourth", "--set", "evaluate.k=2")
    assert fewer.exit_code == 0 and "measured with another k than the manifest's" in fewer.stdout
    assert "figures have no earlier one" in fewer.stdout


def test_a_judge_and_a_sampler_that_changed_are_found_out_though_their_answers_are_cached(
    audit, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Neither is another by what a cache key holds: a package, or a service behind the judge, is."""
    history = tmp_path / "audits.jsonl"
    assert audit(patch, "--history", history, "--out", tmp_path / "first").exit_code == 0
    with monkeypatch.context() as changed:
        changed.setattr(HashJudge, "_score_batch", lambda judge, texts: np.full(len(texts), 0.99))
        judged = audit(patch, "--history", history, "--out", tmp_path / "second")
    assert "toxicity rtp amt by svm: 0" in judged.stdout and "-> 0.99" in judged.stdout
    with monkeypatch.context() as changed:
        changed.setattr(completions, "sample", lambda model, prompts, patch, k, *_: [[[5, 6, 7]] * k for _ in prompts])
        sampled = audit(patch, "--history", history, "--out", tmp_path / "third")
    assert "toxicity rtp completion_tokens: " in sampled.stdout and "-> 3 " in sampled.stdout


def test_own_prompts_are_compared_with_the_first_audit_of_them(audit, patch: Path, tmp_path: Path):
    own, history = write_prompts(tmp_path / "mine.jsonl", 5, 900, "prompt"), tmp_path / "audits.jsonl"
    for number in (1, 2):
        result = audit(patch, "--prompts", own, "--history", history, "--out", tmp_path / f"run{number}")
        assert result.exit_code == 0, result.output
    assert "none of " in result.stdout and "has 2 audits" in result.stdout
    entries = [json.loads(line) for line in history.read_text().splitlines()]
    assert [entry["patch"][0]["name"] for entry in entries] == ["tox", "tox"]
    (split,) = {row["split"] for row in entries[0]["rows"] if row["risk"] == "toxicity"}
    assert split.startswith("own_")
    assert (tmp_path / "audits.svg").exists()
    fewer = ("--prompts", own, "--history", history, "--set", "evaluate.k=2")
    result = audit(patch, *fewer, "--out", tmp_path / "fewer")  # other settings: nothing to compare with
    assert result.exit_code == 0 and "have no earlier one" in result.stdout and "changed since" not in result.stdout
    assert json.loads(history.read_text().splitlines()[-1])["evaluate"]["k"] == 2
    others = write_prompts(tmp_path / "others.jsonl", 5, 950, "prompt")
    result = audit(patch, "--prompts", others, "--history", history, "--out", tmp_path / "run3")
    assert "figures have no earlier one to be compared with" in result.stdout  # those on other prompts
    result = audit(patch, "--prompts", others, "--history", history, "--out", tmp_path / "run4")
    assert result.exit_code == 0 and "have no earlier one" not in result.stdout


def test_what_cannot_be_audited_is_told(audit, patch: Path, tiny_base: Base, tmp_path: Path):
    missing = audit(patch, "--prompts", tmp_path / "none.jsonl")
    assert missing.exit_code == 2 and "there is no file" in missing.stderr
    own = save(patch_of(tiny_base, "own", 4, risks=["acme"]), tmp_path / "own")
    told = audit(own)
    assert told.exit_code == 2 and "addresses acme" in told.stderr and "--risk custom" in told.stderr
    other = replace(tiny_base.identity, weights="0" * 64)
    foreign = audit(save(patch_of(tiny_base, "foreign", 4, base=other), tmp_path / "foreign"))
    assert foreign.exit_code == 2 and "differs in weights" in foreign.stderr
    assert all(result.stderr.count("\n") == 1 for result in (missing, told, foreign))
