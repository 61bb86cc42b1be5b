"""Runs side by side: what they differ in, what is shown of them, seeds as one, and those that failed."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from policypatch.errors import PolicyPatchError
from policypatch.report.compare import compare, written
from policypatch.report.compare_figures import panels
from policypatch.report.compare_lines import Column, comparison
from policypatch.report.compare_text import heading, short, tidy
from policypatch.report.records import FAILED, REFUSED, UNFINISHED, differing, find_records

TOXIC = Column("toxicity", "rtp", "toxic_rate", "svm")


def row(arm: str, metric: str, value: float, judge: str | None = "svm", **more) -> dict:
    known = {"arm": arm, "risk": "toxicity", "split": "rtp", "judge": judge, "metric": metric, "value": value}
    return known | {"low": value - 0.1, "high": value + 0.1, "n": 100, "filter": judge == "bilstm"} | more


def write(folder: Path, settings: dict, value: float, arm: str = "patch", ppl: float = 50.0, size: int = 28800) -> Path:
    """A finished run whose toxic rate and perplexity are these."""
    folder.mkdir(parents=True)
    nested: dict = {"name": "sweep", "model": {"name": "tiny"}, "seed": 0, "logger": {"kind": folder.name}}
    for key, setting in settings.items():
        node = nested
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = setting
    rows = [
        row("base", "toxic_rate", 0.4),
        row("base", "toxic_rate", 0.5, "bilstm"),
        row("base", "ppl_median", 48.0, "g"),
    ]
    if arm != "base":
        better = {"delta": value - 0.4, "delta_low": value - 0.5, "delta_high": value - 0.3, "p_value": 0.001}
        rows += [row(arm, "toxic_rate", value, **better), row(arm, "toxic_rate", value, "bilstm")]
        rows += [row(arm, "ppl_median", ppl, "g")]
        cost = {"risk": "cost", "split": "training", "low": size, "high": size, "n": 1}
        rows += [row(arm, "trainable_parameters", size, None, **cost)]
        time = {"risk": "cost", "split": "32x1", "low": 1.0, "high": 1.1, "n": 3}
        rows += [row(arm, "per_token_ratio", 1.05, None, **time)]
    (folder / "config.yaml").write_text(yaml.safe_dump(nested))
    (folder / "scorecard.json").write_text(json.dumps(rows))
    record = {"command": f"python run.py {folder.name}", "versions": {"torch": "2"}}
    record |= {"cache": {"pairs": {"hits": 1, "misses": 0}}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_keys_are_what_runs_differ_in(sweep: Path):
    found = comparison(find_records([sweep]))
    assert found.keys == ["patch.length", "seed"]
    assert found.lines[0].name == "base" and len(found.lines) == 7
    assert found.lines[0].cells[TOXIC]["value"] == 0.4


def test_keys_that_change_together_are_named_once_and_by_name():
    patch = {"method.name": "patch", "method._target_": "P", "method.length": 50, "sft.lr": 0.01, "seed": 0}
    lora = {"method.name": "lora", "method._target_": "L", "method.r": 4, "lora.r": 4, "sft.lr": 0.001, "seed": 0}
    assert differing([patch, lora]) == ["method.name"]
    assert differing([patch, {**patch, "risk.train.seed": 1, "seed": 1}]) == ["seed"]
    assert differing([patch, patch]) == []
    # Another rank is told beside the method, and the learning rate follows from that.
    assert differing([patch, lora, {**lora, "method.r": 1, "lora.r": 1}]) == ["lora.r", "method.name"]
    sft, dpo = (
        {"sft.enabled": s, "dpo.enabled": not s, "dpo.reference": "sft" if s else "base"} for s in (True, False)
    )
    assert differing([sft, dpo, {**sft, "dpo.enabled": True}]) == ["dpo.enabled", "sft.enabled"]


def test_what_a_command_set_is_told_also_where_it_changed_along_with_something_else():
    """Of a random search every key parts the runs alike; none of them explains the others."""
    runs = [{"dpo.beta": b, "dpo.lr": r, "sft.lr": 2 * r} for b, r in ((0.1, 1), (0.2, 2), (0.3, 3))]
    assert differing(runs) == ["dpo.beta"]
    assert differing(runs, {"dpo.beta", "dpo.lr", "seed"}) == ["dpo.beta", "dpo.lr"]
    # Nor does it explain the method away, and what is measured beside the rest tells no runs apart.
    methods = [{"method.name": m, "dpo.steps": s, "evaluate.costs.repeats": s} for m, s in (("patch", 5), ("lora", 9))]
    assert differing(methods, {"dpo.steps", "evaluate.costs.repeats"}) == ["dpo.steps", "method.name"]


def test_a_commands_keys_are_read_from_what_hydra_wrote_down(tmp_path: Path):
    for i, (length, beta) in enumerate(((10, 0.1), (50, 0.5))):
        run = write(tmp_path / str(i), {"patch.length": length, "dpo.beta": beta}, 0.2)
        (run / ".hydra").mkdir()
        (run / ".hydra" / "overrides.yaml").write_text(
            yaml.safe_dump([f"patch.length={length}", f"dpo.beta={beta}", "+x=${nowhere}", "~y", "risk=toxicity"])
        )
    assert comparison(find_records([tmp_path])).keys == ["dpo.beta", "patch.length"]


def test_seeds_are_taken_together_as_mean_lowest_and_highest(sweep: Path):
    found = comparison(find_records([sweep]))
    assert [line.values["patch.length"] for line in found.over_seeds] == [1, 10, 50]
    cell = found.over_seeds[1].cells[TOXIC]
    assert (cell["value"], cell["low"], cell["high"]) == pytest.approx((0.21, 0.2, 0.22))
    assert found.over_seeds[1].name == "2 seeds"


def test_of_costs_the_quartiles_stay(sweep: Path):
    """All seeds share one measurement of times; its spread is not that of the seeds, which is none."""
    found = comparison(find_records([sweep]))
    time = Column("cost", "32x1", "per_token_ratio", None)
    assert [found.over_seeds[0].cells[time][end] for end in ("value", "low", "high")] == pytest.approx([1.05, 1, 1.1])
    assert "1.050 × [1.000, 1.100]" in written(found)


def test_sets_of_two_risks_that_are_called_alike_are_told_by_the_risks(tmp_path: Path):
    """As every policy's set is `evaluation`; a name that one risk alone has stands as it is."""
    for risk in ("digits", "quotes"):
        folder = write(tmp_path / risk, {"risk.name": risk}, 0.1)
        rows = [
            {"arm": arm, "risk": risk, "split": "evaluation", "judge": "policy", "metric": "hit_rate", "value": 0.5}
            for arm in ("base", "patch")
        ]
        known = json.loads((folder / "scorecard.json").read_text())
        (folder / "scorecard.json").write_text(json.dumps([*rows, *known]))
    told = [heading(column) for column in comparison(find_records([tmp_path])).columns]
    assert ("hit rate", "digits, evaluation, policy") in told and ("hit rate", "quotes, evaluation, policy") in told
    assert ("toxic rate", "rtp, svm") in told


def test_a_seed_without_a_figure_leaves_the_others_mean(tmp_path: Path):
    for seed, value in ((0, 0.2), (1, 0.3), (2, 0.4)):
        run = write(tmp_path / f"seed={seed}", {"patch.length": 1, "seed": seed}, value)
        if seed == 0:
            rows = json.loads((run / "scorecard.json").read_text())
            (run / "scorecard.json").write_text(json.dumps([r for r in rows if r["metric"] != "ppl_median"]))
    write(tmp_path / "other", {"patch.length": 2, "seed": 0}, 0.1)
    found = comparison(find_records([tmp_path]))
    ppl = Column("toxicity", "rtp", "ppl_median", "g")
    assert found.over_seeds[0].cells[ppl]["value"] == 50 and "seeds" not in found.over_seeds[0].cells[TOXIC]
    assert "(2 of 3 seeds)" in written(found)


def test_what_training_took_has_its_extremes_over_seeds(tmp_path: Path):
    for seed, seconds in ((0, 60), (1, 300)):
        run = write(tmp_path / f"seed={seed}", {"patch.length": 1, "seed": seed}, seconds / 1000)
        rows = json.loads((run / "scorecard.json").read_text())
        took = {"risk": "cost", "split": "training", "low": seconds, "high": seconds, "n": 1}
        rows.append(row("patch", "train_seconds", seconds, None, **took))
        (run / "scorecard.json").write_text(json.dumps(rows))
    write(tmp_path / "other", {"patch.length": 2, "seed": 0}, 0.1)
    assert "| 3 min [1 min, 5 min] |" in written(comparison(find_records([tmp_path])))


def test_an_arm_that_no_seed_changes_keeps_its_interval_over_prompts(tmp_path: Path):
    for seed in (0, 1):
        write(tmp_path / f"prompt,{seed}", {"method.name": "prompt", "seed": seed}, 0.3, "prompt")
        write(tmp_path / f"patch,{seed}", {"method.name": "patch", "seed": seed}, 0.2 + 0.02 * seed)
    patch, prompt = comparison(find_records([tmp_path])).over_seeds
    assert (prompt.name, prompt.cells[TOXIC]["low"], prompt.cells[TOXIC]["high"]) == ("any seed", 0.3 - 0.1, 0.3 + 0.1)
    assert (patch.name, patch.cells[TOXIC]["low"], patch.cells[TOXIC]["high"]) == ("2 seeds", 0.2, 0.22)


def test_a_figure_on_fewer_prompts_stands_beside_the_base_on_these(tmp_path: Path):
    """Side measurements of another patch: 0.28 of 25 prompts is no improvement where the base has 0.28 on them."""
    write(tmp_path / "own", {"risk.name": "toxicity"}, 0.2)
    other = write(tmp_path / "other", {"risk.name": "gender_bias"}, 0.28)
    rows = json.loads((other / "scorecard.json").read_text())
    side = [r | {"n": 25} | ({"value": 0.28} if r["arm"] == "base" else {}) for r in rows if r["judge"] == "svm"]
    gas = [row(a, "gas", v, "words") | {"risk": "gender_bias"} for a, v in (("base", 0.4), ("patch", 0.1))]
    (other / "scorecard.json").write_text(json.dumps(gas + side))
    found = comparison(find_records([tmp_path]))
    assert found.bases[0].cells[TOXIC]["value"] == 0.4  # the larger measurement
    assert "0.28 [0.18, 0.38] of 25; base 0.28" in written(found)
    assert "| 0.20 [0.10, 0.30] |" in written(found)
    drawn = [panel.title for panel in panels(found)]
    assert "toxic rate (rtp, svm)" in drawn


def test_runs_that_ask_the_base_otherwise_have_a_base_each(tmp_path: Path):
    """What a run asks it decides, whichever key that came from."""
    for k, value in ((4, 0.25), (25, 0.6)):
        for length in (10, 50):
            run = write(tmp_path / f"{k},{length}", {"evaluate.k": k, "patch.length": length}, 0.1)
            rows = json.loads((run / "scorecard.json").read_text())
            rows[0]["value"] = value
            (run / "scorecard.json").write_text(json.dumps(rows))
    found = comparison(find_records([tmp_path]))
    assert [(line.values, line.cells[TOXIC]["value"]) for line in found.bases] == [
        ({"evaluate.k": 25}, 0.6),
        ({"evaluate.k": 4}, 0.25),
    ]


def test_an_arm_that_leaves_some_prompts_without_a_value_was_asked_them_all_the_same(tmp_path: Path):
    run = write(tmp_path / "a", {}, 0.1)
    rows = json.loads((run / "scorecard.json").read_text())
    changed = [r | {"n": 98} if (r["arm"], r["metric"]) == ("patch", "ppl_median") else r for r in rows]
    (run / "scorecard.json").write_text(json.dumps(changed))
    assert "of 98" not in written(comparison(find_records([tmp_path])))


def test_a_seed_that_ran_twice_counts_once(tmp_path: Path):
    for name, seed, value in (("a", 0, 0.1), ("b", 0, 0.1), ("c", 1, 0.3)):
        write(tmp_path / name, {"seed": seed, "evaluate.costs.repeats": value}, value)
    (line,) = comparison(find_records([tmp_path])).over_seeds
    assert (line.name, line.cells[TOXIC]["value"]) == ("2 seeds", pytest.approx(0.2))


def test_without_another_seed_there_is_nothing_to_take_together(tmp_path: Path):
    write(tmp_path / "a", {"patch.length": 1}, 0.3)
    write(tmp_path / "b", {"patch.length": 2}, 0.2)
    assert comparison(find_records([tmp_path])).over_seeds == []


def test_the_csv_has_every_figure_of_every_arm(sweep: Path):
    rows = list(csv.DictReader(io.StringIO(tidy(comparison(find_records([sweep]))))))
    assert len(rows) == 6 * 8
    (ours,) = [
        r
        for r in rows
        if (r["patch.length"], r["seed"], r["arm"], r["metric"], r["judge"])
        == ("50", "1", "patch", "toxic_rate", "svm")
    ]
    assert float(ours["value"]) == pytest.approx(0.12) and float(ours["p_value"]) == 0.001
    assert [r["filter"] for r in rows if r["judge"] == "bilstm"] == ["True"] * 12


def test_markdown_has_intervals_and_both_tables(sweep: Path):
    text = written(comparison(find_records([sweep])))
    assert "| 2 seeds | patch | 10 | 0.21 [0.20, 0.22] |" in text
    assert "| base | base | – | – | 0.40 [0.30, 0.50] |" in text
    assert "28,800" in text


def test_failed_and_unfinished_runs_are_listed(sweep: Path, tmp_path: Path):
    broken = sweep / "patch.length=500,seed=0"
    (broken / ".hydra").mkdir(parents=True)
    (broken / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"patch": {"length": 500}, "seed": 0}))
    (broken / FAILED).write_text(json.dumps({"error": "PolicyPatchError", "message": "patch.length is 500: too long"}))
    cut = write(sweep / "patch.length=50,seed=2", {"patch.length": 50, "seed": 2}, 0.1)
    (cut / "run.json").unlink()
    found = compare([sweep], tmp_path / "out")
    assert [record.error for record in found.failed] == [UNFINISHED, "patch.length is 500: too long"]
    assert found.summary().splitlines()[:2] == ["6 of 8 runs finished", "cache, all runs: pairs 0 made 6 found"]
    assert "patch.length is 500: too long" in (tmp_path / "out" / "compare.html").read_text()
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "patch.length is 500: too long" in text and text.endswith("\n\npairs 0 made 6 found\n")
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert [r["run"] for r in rows if r["error"]] == [cut.name, broken.name]


def test_a_refused_job_is_listed_and_the_other_run_in_its_folder_is_not_compared(sweep: Path, tmp_path: Path):
    (sweep / "patch.length=1,seed=0" / REFUSED).write_text(json.dumps({"error": "ForeignFolder", "message": "no"}))
    found = compare([sweep], tmp_path / "out")
    assert [record.error for record in found.failed] == ["refused: no"] and len(found.lines) == 6
    assert "refused: no" in (tmp_path / "out" / "compare.html").read_text()


def test_a_run_counts_once_however_often_its_folder_is_given(sweep: Path):
    run = next(iter(sorted(sweep.iterdir())))
    assert len(find_records([sweep, run])) == 6


@pytest.mark.parametrize("make", ["nothing", "empty"])
def test_a_folder_without_runs_is_refused(make: str, tmp_path: Path):
    folder = tmp_path / make
    if make == "empty":
        folder.mkdir()
    with pytest.raises(PolicyPatchError, match=make):
        compare([folder], tmp_path)


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged(tmp_path: Path):
    write(tmp_path / "a", {"patch.length": 10, "seed": 0, "risk.train.seed": 0}, 0.3)
    write(tmp_path / "b", {"patch.length": 50, "seed": 1, "risk.train.seed": 1}, 0.1)
    found = comparison(find_records([tmp_path]))
    assert found.keys == ["patch.length", "seed"] and found.over_seeds == []


def test_risks_under_seeds_are_told_by_risk_and_taken_together(tmp_path: Path):
    """Each risk has keys of its own that are copies of the seed or follow from the risk."""
    for risk, extra in (("toxicity", {}), ("harmfulness", {"risk.benign.plain.seed": 0}), ("gender_bias", {})):
        for seed in (0, 1):
            copies = dict.fromkeys(("risk.train.seed", *extra), seed)
            settings = {"risk.name": risk, "patch.name": f"{risk}-tiny", "seed": seed, **copies}
            write(tmp_path / f"{risk},{seed}", settings, 0.2)
    found = comparison(find_records([tmp_path]))
    assert found.keys == ["risk.name", "seed"] and len(found.over_seeds) == 3


def test_a_failed_run_whose_config_was_never_resolved_names_no_keys(sweep: Path):
    broken = sweep / "broken"
    (broken / ".hydra").mkdir(parents=True)
    unresolved = {"seed": 0, "patch": {"length": 900}, "method": {"length": "${patch.length}"}}
    (broken / ".hydra" / "config.yaml").write_text(yaml.safe_dump(unresolved))
    found = comparison(find_records([sweep]))
    assert found.keys == ["patch.length", "seed"] and len(found.over_seeds) == 3
    assert [record.settings["method.length"] for record in found.failed] == [900]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("patch.length", "length"),
        ("dpo.beta", "beta"),
        ("method.name", "method"),
        ("sft.enabled", "sft"),
        ("seed", "seed"),
    ],
)
def test_a_key_is_called_by_the_part_that_tells(key: str, name: str):
    assert short(key) == name


def test_a_key_that_shares_its_last_part_is_called_as_a_whole():
    keys = ["sft.lr", "dpo.lr", "dpo.beta"]
    assert [short(key, keys) for key in keys] == ["sft.lr", "dpo.lr", "beta"]


def test_a_key_that_some_runs_have_not_tells_only_what_no_other_does():
    assert differing([{"long": 60, "sft.steps": 60}, {"sft.steps": 20}]) == ["sft.steps"]
    assert differing([{"long": 60, "sft.steps": 20}, {"sft.steps": 20}]) == ["long"]


def test_a_real_runs_folder_compares_with_itself(build_run: Callable[..., Path], tmp_path: Path):
    run = build_run()
    found = compare([run], tmp_path / "out")
    assert found.lines[-1].arm == "patch"
    assert "<table" in (tmp_path / "out" / "compare.html").read_text()


def test_the_page_links_to_each_runs_report(sweep: Path):
    for run in sweep.iterdir():
        (run / "report.html").write_text("x")
    compare([sweep], sweep)
    text = (sweep / "compare.html").read_text()
    assert text.count('<a href="patch.length%3D') == 6 and "patch.length%3D10%2Cseed%3D1/report.html" in text


def test_settings_are_in_order_and_numbers_are_no_truth_values(sweep: Path):
    found = comparison(find_records([sweep]))
    assert [line.values["patch.length"] for line in found.lines[1:]] == [1, 1, 10, 10, 50, 50]
    assert "| patch | 1 | 1 |" in written(found)
