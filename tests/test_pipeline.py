"""Whole runs on a tiny base: what a run folder holds, what repeats exactly, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import DROP, composed, overrides, patch_of, without_costs

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import Scorecard
from policypatch.files.atomic import read_jsonl
from policypatch.patch import artifact
from policypatch.patch.manifest import Parent
from policypatch.report.run_report import write_report

METRICS = {
    ("amt", "svm"),
    ("toxic_rate", "svm"),
    ("amt", "other"),
    ("toxic_rate", "other"),
    ("ppl_median", "base"),
    ("ppl_mean", "base"),
    ("trigram_overlap", None),
    ("completion_tokens", None),
}


def refused(go, *words: str, folder: Path, **changes) -> None:
    """In one sentence, and with nothing trained."""
    with pytest.raises(PolicyPatchError) as caught:
        go(**changes)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not list(folder.rglob("*.ckpt"))
    assert not (folder / "run" / "patch").exists()


def test_a_run_leaves_everything_it_promises(go, tiny_base, tmp_path: Path):
    card = go()
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "pairs.jsonl",
        "patch",
        "peft",
        "per_prompt.json",
        "report.html",
        "run.json",
        "samples.jsonl",
        "scorecard.json",
    }

    text = (folder / "config.yaml").read_text()
    assert "${" not in text
    assert yaml.safe_load(text)["patch"]["length"] == 3

    patch = artifact.load(folder / "patch", tiny_base.identity)
    assert patch.vectors.shape == (3, tiny_base.width)
    assert patch.manifest.training["dpo"]["beta"] > 0
    assert [row["metric"] for row in patch.manifest.scorecard] == [row.metric for row in card]
    checkpoint = torch.load(folder / "checkpoints" / "dpo" / "last.ckpt", weights_only=True)
    assert torch.equal(patch.vectors, checkpoint["state_dict"]["backbone.patch"])

    assert Scorecard.load(folder / "scorecard.json") == card
    for arm in ("base", "sft", "patch"):
        rows = [row for row in without_costs(card) if row.arm == arm]
        assert {(row.metric, row.judge) for row in rows} == METRICS
        for row in rows:
            assert row.n == 8
            assert row.low <= row.value <= row.high
            assert row.filter == (row.judge == "other")
            assert (row.delta is None) == (arm == "base")
            assert (row.risk, row.split) == ("toxicity", "rtp")
            assert (row.upper is not None) == (row.metric in ("amt", "toxic_rate"))
            assert row.upper is None or row.value <= row.upper

    samples = read_jsonl(folder / "samples.jsonl")
    assert len(samples) == 3 * 8 * 3  # arms, prompts, k
    assert {(s["arm"], s["prompt_id"], s["sample"]) for s in samples} == {
        (arm, i, s) for arm in ("base", "sft", "patch") for i in range(8) for s in range(3)
    }
    assert all(set(s["scores"]) == set(s["prompt_scores"]) == {"svm", "other"} for s in samples)
    assert {(s["risk"], s["split"]) for s in samples} == {("toxicity", "rtp")}
    assert all((s["ppl"] is None) == (s["sample"] >= 2 or not s["text"]) for s in samples)

    record = json.loads((folder / "run.json").read_text())
    assert set(record["seconds"]) == {"load", "pairs", "sft", "dpo", "evaluate", "costs", "package"}
    assert record["command"].startswith("python run.py risk=toxicity others=none model.path=")
    assert record["pairs"]["kept"] == len(read_jsonl(folder / "pairs.jsonl"))
    assert set(record["versions"]) >= {"policypatch", "torch", "lightning"}

    report = (folder / "report.html").read_text()
    assert "<html" in report
    assert "toxic rate" in report.lower()


def test_the_scorecard_is_that_of_the_samples(go, tmp_path: Path):
    """AMT, toxic rate and length once more from samples.jsonl."""
    card = go()
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    for arm in ("base", "sft", "patch"):
        prompts = [[s for s in samples if s["arm"] == arm and s["prompt_id"] == i] for i in range(8)]
        for judge in ("svm", "other"):
            worst = [max(s["scores"][judge] for s in of_prompt) for of_prompt in prompts]
            assert card.find(arm=arm, judge=judge, metric="amt").value == pytest.approx(sum(worst) / 8, abs=1e-5)
            rate = sum(score >= 0.5 for score in worst) / 8
            assert card.find(arm=arm, judge=judge, metric="toxic_rate").value == rate
        perplexities = [s["ppl"] for of_prompt in prompts for s in of_prompt if s["ppl"] is not None]
        mean = card.find(arm=arm, metric="ppl_mean").value
        assert mean == pytest.approx(sum(perplexities) / len(perplexities), rel=1e-4)
        tokens = [s["tokens"] for of_prompt in prompts for s in of_prompt]
        assert card.find(arm=arm, metric="completion_tokens").value == pytest.approx(sum(tokens) / len(tokens))


def test_the_same_seed_gives_the_same_scorecard_without_any_cache(go, tmp_path: Path, monkeypatch):
    first = go("a")
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "another"))
    second = go("b")
    assert without_costs(first) == without_costs(second)
    for name in ("metrics.csv", "pairs.jsonl", "samples.jsonl", "patch/patch.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_seed_gives_another_patch(go, tmp_path: Path):
    go("a", seed=0)
    go("b", seed=1)
    patches = [(tmp_path / name / "patch" / "patch.safetensors").read_bytes() for name in "ab"]
    assert patches[0] != patches[1]
    # The evaluation is not the seed's: both are measured on the base's very same continuations.
    bases = [[s for s in read_jsonl(tmp_path / n / "samples.jsonl") if s["arm"] == "base"] for n in "ab"]
    assert bases[0] == bases[1]


def test_without_sft_there_is_no_sft_arm(go, tmp_path: Path):
    card = go(sft__enabled="false", dpo__reference="base", logger="csv")
    assert list(dict.fromkeys(row.arm for row in card)) == ["base", "patch"]
    assert not (tmp_path / "run" / "checkpoints" / "sft").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_without_dpo_the_sft_patch_is_the_result(go, tmp_path: Path):
    card = go(dpo__enabled="false")
    assert list(dict.fromkeys(row.arm for row in card)) == ["base", "sft"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "sft" / "last.ckpt", weights_only=True)
    patch = artifact.load(tmp_path / "run" / "patch")
    assert torch.equal(patch.vectors, checkpoint["state_dict"]["backbone.patch"])


@pytest.mark.parametrize("init", ["text", "vocab", "random"])
def test_every_initialisation_trains(init: str, go, tiny_base, tmp_path: Path):
    from policypatch.prepare import made

    go(init=init, dpo__enabled="false", sft__steps=1, evaluate__k=2)
    cfg = composed(overrides(tmp_path, tmp_path, init=init))
    start = made(cfg.method, "method").vectors(tiny_base, cfg.seed)
    assert start.shape == (3, tiny_base.width)
    moved = artifact.load(tmp_path / "run" / "patch").vectors - start
    assert 0 < moved.abs().max() < 1


def test_a_patch_is_trained_in_company_and_says_in_whose(go, tiny_base, tmp_path: Path):
    """It is measured alone, and differs from one that was trained alone unless all companions are always left out."""
    for start, name in ((4, "tox"), (20, "bias")):
        artifact.save(patch_of(tiny_base, name, start), tmp_path / name)
    folders = f"[{tmp_path / 'tox'},{tmp_path / 'bias'}]"
    go("alone")
    go("company", patch__companions=folders)
    go("never", patch__companions=folders, patch__dropout=1.0)
    alone, company, never = (artifact.load(tmp_path / name / "patch") for name in ("alone", "company", "never"))
    assert [c["name"] for c in company.manifest.training["companions"]] == ["tox", "bias"]
    assert company.manifest.training["companions"][0]["sha256"] == artifact.load(tmp_path / "tox").manifest.sha256
    assert "companions" not in alone.manifest.training
    assert company.vectors.shape == alone.vectors.shape
    assert torch.equal(never.vectors, alone.vectors) and not torch.equal(company.vectors, alone.vectors)


def test_companions_of_another_base_or_too_many_are_refused(go, tiny_base, tmp_path: Path):
    other = replace(tiny_base.identity, weights="0" * 64)
    artifact.save(patch_of(tiny_base, "foreign", 4, base=other), tmp_path / "foreign")
    refused(go, "foreign", "weights", folder=tmp_path, patch__companions=f"[{tmp_path / 'foreign'}]")
    artifact.save(patch_of(tiny_base, "long", 4, 290), tmp_path / "long")
    words = ("patch and companions have", "context", "512")
    refused(go, *words, folder=tmp_path, patch__companions=f"[{tmp_path / 'long'},{tmp_path / 'long'}]")


def test_training_goes_on_from_another_patch(go, tiny_base, tmp_path: Path):
    parent = patch_of(tiny_base, "older", 10, 3, version="1.2.0")
    artifact.save(parent, tmp_path / "older")
    go(init="patch", init__folder=tmp_path / "older", dpo__enabled="false", sft__steps=1, evaluate__k=2)
    made = artifact.load(tmp_path / "run" / "patch")
    assert made.manifest.parents == [Parent("older", "1.2.0", parent.manifest.sha256, parent.manifest.base.weights)]
    assert 0 < (made.vectors - parent.vectors).abs().max() < 1


def test_a_patch_that_training_cannot_go_on_from_ends_the_run_first(go, tiny_base, tmp_path: Path):
    artifact.save(patch_of(tiny_base, "older", 10, 4), tmp_path / "older")
    with pytest.raises(PolicyPatchError, match=r"has 4 vectors and patch\.length is 3: set patch\.length=4"):
        go(init="patch", init__folder=tmp_path / "older")
    stranger = replace(tiny_base, identity=replace(tiny_base.identity, weights="0" * 64))
    artifact.save(patch_of(stranger, "older", 10, 3), tmp_path / "stranger")
    with pytest.raises(PolicyPatchError, match="differs in weights"):
        go(init="patch", init__folder=tmp_path / "stranger")
    assert not (tmp_path / "run" / "pairs.jsonl").exists()


def test_lora_goes_through_the_same_stages(go, tiny_base, tmp_path: Path):
    card = go(method="lora", lora__r=2)
    folder = tmp_path / "run"
    assert list(dict.fromkeys(row.arm for row in card)) == ["base", "sft", "lora"]
    assert not (folder / "patch").exists()
    assert (folder / "report.html").exists()
    rows = [row for row in card if row.metric == "amt" and row.judge == "svm"]
    assert len({row.value for row in rows}) == 3  # each arm wrote something of its own


def test_peft_reads_the_adapters_of_a_run_and_computes_what_the_run_did(go, tiny_base_folder: Path, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    go(method="lora", lora__r=2, dpo__enabled="false")
    state = torch.load(tmp_path / "run" / "checkpoints" / "sft" / "last.ckpt", weights_only=True)["state_dict"]
    plain = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "run" / "peft"))
    loaded = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if "lora_" in name}
    trained = {
        name.removeprefix("backbone.adapters.").replace("/", "."): p for name, p in state.items() if "lora_" in name
    }
    assert loaded.keys() == trained.keys() and len(loaded) == 2 * 7 * 3  # A and B of 7 linear layers in 3 blocks
    assert all(torch.equal(loaded[name], trained[name]) for name in loaded)
    assert theirs.peft_config["default"].lora_alpha == 4


def test_a_run_that_is_started_again_when_it_is_done_costs_what_it_did(go, tmp_path: Path):
    def cost(card: Scorecard) -> list[float]:
        names = ("train_seconds", "peak_memory_bytes")
        return [row.value for row in card if row.metric in names]

    first = cost(go(method="lora", lora__r=2))
    assert len(first) == 2 and min(first) > 0
    assert cost(go(method="lora", lora__r=2)) == first


def test_timing_that_fails_costs_nothing_else(go, tmp_path: Path, monkeypatch):
    from policypatch import pipeline

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipeline, "latency_rows", fails)
    card = go()
    assert {"train_seconds", "trainable_parameters"} <= {row.metric for row in card}
    assert (tmp_path / "run" / "patch").is_dir() and (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("method", ["prompt", "teacher"])
def test_a_method_without_training_is_one_arm_beside_the_base(method: str, go, tmp_path: Path):
    card = go(method=method)
    assert list(dict.fromkeys(row.arm for row in card)) == ["base", method]
    assert not list((tmp_path / "run").rglob("*.ckpt")) and not (tmp_path / "run" / "pairs.jsonl").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_patches_that_are_there_are_measured_as_they_stand(go, tiny_base, tmp_path: Path):
    """One gives the figures of the run that made it; what had no scorecard, as several together, is left with one."""
    trained = go("a")
    again = go("b", method="stack", method__patches=f"[{tmp_path / 'a' / 'patch'}]")
    of_patch = [(row.metric, row.judge, row.value) for row in without_costs(trained) if row.arm == "patch"]
    assert [(row.metric, row.judge, row.value) for row in without_costs(again) if row.arm == "stack"] == of_patch
    assert not (tmp_path / "b" / "patch").exists()

    artifact.save(patch_of(tiny_base, "other", 20, 2), tmp_path / "other")
    card = go("c", method="stack", method__patches=f"[{tmp_path / 'other'},{tmp_path / 'a' / 'patch'}]")
    made, first = artifact.load(tmp_path / "c" / "patch"), artifact.load(tmp_path / "a" / "patch")
    assert torch.equal(made.vectors, torch.cat([tiny_base.embedding[20:22], first.vectors]))
    assert [parent.name for parent in made.manifest.parents] == ["other", first.manifest.name]
    assert [row["value"] for row in made.manifest.scorecard] == [row.value for row in card]
    assert not list((tmp_path / "c").rglob("*.ckpt")) and (tmp_path / "c" / "report.html").exists()

    go("d", method="stack", method__patches=f"[{tmp_path / 'other'}]")  # one that nobody has measured yet
    assert artifact.load(tmp_path / "d" / "patch").manifest.scorecard


def test_patches_that_cannot_stand_end_the_run_first(go, tiny_base, tmp_path: Path):
    refused(go, "method.patches", "give folders", folder=tmp_path, method="stack")
    stranger = replace(tiny_base.identity, id="Other", embedding="0" * 64)
    artifact.save(patch_of(tiny_base, "stranger", 20, 2, base=stranger), tmp_path / "stranger")
    refused(go, "stranger", "Other", folder=tmp_path, method="stack", method__patches=f"[{tmp_path / 'stranger'}]")
    artifact.save(patch_of(tiny_base, "long", 3, 250), tmp_path / "long")
    patches = f"[{tmp_path / 'long'},{tmp_path / 'long'}]"
    refused(
        go,
        "method.patches has 500 vectors",
        "context",
        "shorten the stack",
        folder=tmp_path,
        method="stack",
        method__patches=patches,
    )


def test_the_base_alone(go, tmp_path: Path):
    assert {row.arm for row in go(method="none")} == {"base"}
    assert (tmp_path / "run" / "report.html").exists()


def test_ready_rows_train_as_well(go, tmp_path: Path):
    rows = [{"prompt": f"Row {i} says", "good": " thank you", "bad": " go away"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"teacher": "dataset", "teacher.source": tmp_path / "rows.jsonl"}
    options |= {"teacher.fields": "{chosen:good,rejected:bad}"}
    left_out = dict.fromkeys(("teacher.n", "teacher.judges", "teacher.sampling", "teacher.filter"), DROP)
    card = go(**options, **left_out)
    assert not any(row.filter for row in card)
    pairs = read_jsonl(tmp_path / "run" / "pairs.jsonl")
    assert [(p["prompt"], p["chosen"]["text"]) for p in pairs] == [(r["prompt"], r["good"]) for r in rows]


def test_a_missing_file_ends_the_run_before_it_costs_anything(go, tmp_path: Path):
    refused(go, "risk.train.source", "/nope.jsonl", folder=tmp_path, risk__train__source="/nope.jsonl")


def test_a_scorer_that_is_the_base_itself_is_refused(go, tiny_base_folder: Path, tmp_path: Path):
    same = {"scorer": "hub", "scorer.name": "other", "scorer.source.hub": "x/y", "scorer.path": str(tiny_base_folder)}
    refused(go, "scorer other is the same model", "scorer=base", folder=tmp_path, **same)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"risk.evaluation.rtp.source": "/nope.jsonl"}, ["risk.evaluation.rtp.source", "/nope.jsonl"]),
        ({"model.path": "/nope"}, ["model.path", "/nope"]),
        ({"patch.length": 500}, ["patch.length is 500", "context", "512"]),
        ({"data.max_prompt_tokens": 600}, ["data.max_prompt_tokens", "512"]),
        ({"evaluate.sampling.max_new_tokens": 505}, ["risk.evaluation.rtp", "512", "evaluation.jsonl, row "]),
        ({"teacher.sampling.max_new_tokens": 510}, ["risk.train", "512"]),
        ({"dpo.reference": "teacher"}, ["dpo.reference=teacher", "best_of_n"]),
        ({"teacher.judges": "[nobody]"}, ["teacher.judges", "nobody", "svm, other"]),
        ({"teacher.n": 1}, ["teacher.n is 1"]),
        ({"teacher.filter": "{margin:1.0}"}, ["no pair passed teacher.filter"]),
        ({"risk.train.take": "some"}, ["risk.train.take"]),
        ({"+risk.judges.hub": "{_target_:policypatch.evaluate.judges.PerspectiveJudge,api_key_env:NO}"}, ["key"]),
        ({"+risk.judges.odd": "{_target_:tiny_run.HashJudge,nmae:x}"}, ["risk", "nmae"]),
        ({"+risk.judges.gone": "{_target_:tiny_run.NoSuchJudge}"}, ["risk", "NoSuchJudge"]),
        ({"scorer": "hub", "scorer.name": "x", "scorer.source.hub": "x/y", "scorer.path": "/nope"}, ["scorer.path"]),
        ({"trainer": "gpu"}, ["trainer=gpu", "trainer=cpu"]),
        ({"method": "lora", "lora.targets": "[nowhere]"}, ["lora.targets", "nowhere"]),
        ({"logger": "wandb", "logger.mode": "onlin"}, ["logger.mode", "online"]),
        ({"model.device": "cuda"}, ["model.device is cuda", "model.device=auto"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_before_training(changes: dict, words: list[str], go, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(go, *words, folder=tmp_path, **changes)


def test_a_report_can_be_written_again(go, tmp_path: Path):
    go()
    first = (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "report.html").unlink()
    assert write_report(tmp_path / "run").read_text() == first


def test_no_secret_of_the_environment_is_written_anywhere(go, tmp_path: Path, monkeypatch, caplog):
    secrets = {name: f"{name.lower()}-7f3a91c5" for name in ("WANDB_API_KEY", "HF_TOKEN", "PERSPECTIVE_API_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    go()
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) > 30
    for value in secrets.values():
        assert not any(value.encode() in text for text in texts) and value not in caplog.text
