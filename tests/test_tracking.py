"""Weights & Biases, offline: what a run leaves in its record, and that a failed run does not look finished."""

import json
import struct
import time
from pathlib import Path

import pytest
import wandb
import yaml
from omegaconf import OmegaConf
from tiny_run import ROOT, composed, overrides
from wandb.proto import wandb_internal_pb2

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import read_jsonl, write_jsonl
from policypatch.pipeline import run


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))


def records(folder: Path, job: str, of: str = "offline-run-*") -> list[wandb_internal_pb2.Record]:
    """Everything in the .wandb file of one of the folder's jobs.

    The file is a LevelDB log behind 7 bytes of its own: blocks of 32 KiB of pieces, each with a header of checksum (4),
    length (2) and kind (1: whole record, 2 to 4: its first, middle and last part).
    """
    (path,) = (folder / "wandb").glob(f"{of}/*-{job}.wandb")
    data, at, parts, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a header: the block is padded
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def records_to_the_end(folder: Path, job: str, of: str = "offline-run-*") -> list[wandb_internal_pb2.Record]:
    """`records` once the last of them is there: wandb's service may write it after `finish` has returned."""
    deadline = time.monotonic() + 30
    while not of_kind(found := records(folder, job, of), "exit") and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def of_kind(found: list, kind: str) -> list:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def values(items: list) -> dict[str, object]:
    """Key -> value of history or summary items; nested keys joined with dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_a_run_leaves_an_offline_record(tiny_base_folder, tmp_path: Path):
    arguments = overrides(tiny_base_folder, tmp_path, logger="wandb", name="sweep-7", **{"logger.project": "tests"})
    card = run(composed(arguments), tmp_path / "run", "patch.length=3", arguments)
    assert wandb.run is None
    jobs = {job: records_to_the_end(tmp_path / "run", job) for job in ("sft", "dpo", "eval")}
    own = (tmp_path / "run" / "wandb_id").read_text().strip()
    for job, found in jobs.items():
        (start,) = of_kind(found, "run")[:1]
        assert (start.run_id, start.job_type) == (f"{own}-{job}", job)
        assert (start.run_group, start.display_name, start.project) == ("sweep-7", "patch.length=3", "tests")
        assert list(start.tags) == ["toxicity", "tiny", "patch"]
        config = {item.key: json.loads(item.value_json) for item in start.config.update}
        assert config["patch"]["length"] == 3 and config["model"]["name"] == "tiny"
        (end,) = of_kind(found, "exit")
        assert end.exit_code == 0
        # The pairs are an input of every stage, and the same version of one artifact: its digest is its content's.
        (pairs,) = [a for a in of_kind(found, "artifact") if a.type == "preference-pairs"]
        assert pairs.use_after_commit and pairs.name == "pairs-toxicity"
        assert [content.path for content in pairs.manifest.contents] == ["pairs.jsonl"]

    for stage, steps in (("sft", 4), ("dpo", 5)):
        history = [values(record.item) for record in of_kind(jobs[stage], "history")]
        rows = [row for row in history if f"{stage}/train/loss" in row]
        assert [row[f"{stage}/step"] for row in rows] == list(range(steps))
        assert any(f"{stage}/val/loss" in row for row in history)
        axes = {metric.name or metric.glob_name: metric.step_metric for metric in of_kind(jobs[stage], "metric")}
        assert axes[f"{stage}/*"] == f"{stage}/step"
    found = jobs["eval"]

    summary: dict[str, object] = {}
    for record in of_kind(found, "summary"):
        summary |= values(record.update)
    assert summary["patch/toxic_rate/svm"] == card.find(arm="patch", metric="toxic_rate", judge="svm").value
    row = card.find(arm="patch", metric="toxic_rate", judge="svm")
    assert (summary["patch/toxic_rate/svm/low"], summary["patch/toxic_rate/svm/high"]) == (row.low, row.high)
    assert summary["base/trigram_overlap"] == card.find(arm="base", metric="trigram_overlap").value

    (table_path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/samples*.table.json")
    table = json.loads(table_path.read_text())
    own = ["prompt_id", "prompt", "arm", "sample", "text"]
    assert table["columns"] == [*own, "score/svm", "score/other", "ppl"]
    first = [s for s in read_jsonl(tmp_path / "run" / "samples.jsonl") if s["sample"] == 0]
    assert len(first) == 3 * 8
    assert table["data"] == [
        [*(s[name] for name in own), s["scores"]["svm"], s["scores"]["other"], s["ppl"]] for s in first
    ]

    (artifact,) = [a for a in of_kind(found, "artifact") if a.type == "patch"]
    files = {content.path for content in artifact.manifest.contents}
    assert files == {"patch.safetensors", "patch.json", "README.md"}
    assert set(artifact.aliases) == {"latest", "0.1.0", "seed-0"} and artifact.name == "patch-toxicity-tiny"
    metadata = json.loads(artifact.metadata)
    assert metadata["scorecard"][0]["metric"] == card[0].metric

    # What experiments/wandb_sweep.yaml searches by and for are a figure of the summary and keys of the config.
    searched = yaml.safe_load((ROOT / "experiments" / "wandb_sweep.yaml").read_text())
    assert searched["metric"]["name"] in summary
    assert all(OmegaConf.select(composed(arguments), key) is not None for key in searched["parameters"])


def test_adapters_are_an_artifact_as_well(tiny_base_folder, tmp_path: Path):
    arguments = overrides(tiny_base_folder, tmp_path, logger="wandb", method="lora", patch__name="other")
    run(composed(arguments), tmp_path / "run", "lora", arguments)
    (artifact,) = [a for a in of_kind(records_to_the_end(tmp_path / "run", "eval"), "artifact") if a.type == "lora"]
    assert artifact.name == "lora-other" and set(artifact.aliases) >= {"latest", "seed-0"}
    assert "adapter_model.safetensors" in {content.path for content in artifact.manifest.contents}


def test_a_failed_run_is_recorded_as_failed(tiny_base_folder, tmp_path: Path, monkeypatch):
    from policypatch.train.dpo_module import DPOModule

    def fails(self, batch, batch_idx):
        raise RuntimeError("the machine went down")

    monkeypatch.setattr(DPOModule, "training_step", fails)
    arguments = overrides(tiny_base_folder, tmp_path, logger="wandb")
    with pytest.raises(RuntimeError, match="went down"):
        run(composed(arguments), tmp_path / "run", "", arguments)
    assert wandb.run is None  # or the next job of a sweep would write into it
    codes = {job: of_kind(records_to_the_end(tmp_path / "run", job), "exit")[0].exit_code for job in ("sft", "dpo")}
    assert codes == {"sft": 0, "dpo": 1}
    assert not list((tmp_path / "run" / "wandb").glob("offline-run-*/*-eval.wandb"))
    assert of_kind(records(tmp_path / "run", "dpo"), "run")[0].display_name == "default"


def test_a_run_that_fails_before_its_first_stage_is_recorded_as_failed(tiny_base_folder, tmp_path: Path):
    arguments = overrides(tiny_base_folder, tmp_path, logger="wandb", **{"risk.train.source": "/nope.jsonl"})
    with pytest.raises(PolicyPatchError, match="nope"):
        run(composed(arguments), tmp_path / "run", "", arguments)
    (end,) = of_kind(records_to_the_end(tmp_path / "run", "eval"), "exit")
    assert end.exit_code == 1


def test_all_stages_of_an_agents_trial_go_on_in_its_run(tiny_base_folder, tmp_path: Path, monkeypatch):
    """What `wandb agent` sets, and the command of experiments/wandb_sweep.yaml."""
    wandb.teardown()  # the environment is read when its service starts
    monkeypatch.setenv("WANDB_SWEEP_ID", "search")
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    monkeypatch.setenv("WANDB_MODE", "offline")
    searched = yaml.safe_load((ROOT / "experiments" / "wandb_sweep.yaml").read_text())
    chosen = [word for word in searched["command"] if not word.startswith("$") and "=" in word]
    chosen += [
        f"{key}={of['values'][0] if 'values' in of else of['min']}" for key, of in searched["parameters"].items()
    ]
    arguments = [*overrides(tiny_base_folder, tmp_path, logger="wandb"), *chosen]
    card = run(composed(arguments), tmp_path / "run", "", arguments)
    assert not (tmp_path / "run" / "wandb_id").exists()
    starts, ends, found = [], [], dict[str, object]()
    for folder in sorted((tmp_path / "run" / "wandb").glob("offline-run-*")):
        assert "-trial" in folder.name
        of = records_to_the_end(tmp_path / "run", "trial", folder.name)
        starts += of_kind(of, "run")[:1]
        ends += [end.exit_code for end in of_kind(of, "exit")]
        for record in of_kind(of, "summary"):
            found |= values(record.update)
    assert {(start.run_id, start.job_type, start.run_group) for start in starts} == {("trial", "", "wandb-sweep")}
    assert ends and set(ends) == {0}
    assert found[searched["metric"]["name"]] == card.find(arm="patch", metric="toxic_rate", judge="svm").value


def test_the_environment_decides_the_mode_and_the_folder_keeps_the_id(tmp_path: Path, monkeypatch):
    from types import SimpleNamespace

    from policypatch.report.tracking import open_tracker

    asked = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or SimpleNamespace(finish=lambda **_: 0))
    config = {group: {"name": group} for group in ("risk", "model", "method")}
    cfg = composed(["logger=wandb", "logger.mode=offline"]).logger

    def start(folder: str, job: str = "sft") -> None:
        with open_tracker(cfg, tmp_path / folder, "group", "", config).job(job):
            pass

    start("a")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start("a")
    start("b")
    assert [options["mode"] for options in asked] == ["offline", "disabled", "disabled"]
    assert asked[0]["id"] == asked[1]["id"] != asked[2]["id"]
    start("a", "dpo")
    assert asked[3]["id"].removesuffix("-dpo") == asked[0]["id"].removesuffix("-sft")
    (tmp_path / "a" / "wandb_id").unlink()  # a sweep that is done again in the same place is another run
    start("a")
    assert asked[4]["id"] not in {options["id"] for options in asked[:4]}
    assert all(options["resume"] == "allow" and options["tags"] == [*config] for options in asked)


def test_the_table_holds_the_first_continuations_of_fifty_prompts(tmp_path: Path):
    from policypatch.report.tracking import samples_table

    row = {"prompt": "p", "text": "t", "scores": {"svm": 0.2}, "ppl": None}
    write_jsonl(
        tmp_path / "samples.jsonl",
        [row | {"prompt_id": i, "arm": arm, "sample": s} for arm in "ab" for i in range(60) for s in range(2)],
    )
    columns, rows = samples_table(tmp_path / "samples.jsonl")
    assert columns == ["prompt_id", "prompt", "arm", "sample", "text", "score/svm", "ppl"]
    assert rows == [[i, "p", arm, 0, "t", 0.2, None] for arm in "ab" for i in range(50)]


def test_logger_csv_starts_no_wandb_run(tmp_path: Path, monkeypatch):
    from policypatch.report.tracking import open_tracker

    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("not asked for"))
    tracker = open_tracker(composed(["logger=csv"]).logger, tmp_path, "group", "", {})
    with tracker.job("sft") as job:
        assert list(job.loggers()) == []
    tracker.close(1)


def test_a_server_that_cannot_be_reached_costs_nothing_but_a_warning(tiny_base_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("policypatch.report.tracking.INIT_TIMEOUT_S", 1.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    arguments = overrides(tiny_base_folder, tmp_path, logger="wandb", **{"logger.mode": "online"})
    run(composed(arguments), tmp_path / "run", "", arguments)
    assert caplog.text.count("the run goes on offline") == 1  # the later stages know
    for job in ("sft", "dpo", "eval"):
        (end,) = of_kind(records_to_the_end(tmp_path / "run", job), "exit")
        assert end.exit_code == 0
