"""What stacks are compared with beside their specialists: values by hand, and that small p-values can be told."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import ROOT
from typer.testing import CliRunner

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import Row, Scorecard

sys.path.insert(0, str(ROOT / "experiments"))
import contrasts
import interference

TOX = {"risk": "toxicity", "metric": "toxic_rate", "judge": "svm", "split": "rtp"}
GAS = {"risk": "gender_bias", "metric": "gas", "judge": "names", "split": "work"}
KL = {"risk": "utility", "metric": "kl_benign", "judge": None, "split": "requests"}


def run(arms: dict[str, np.ndarray | list[float]], place: dict) -> tuple[list[dict], list[dict]]:
    """A scorecard and its values."""
    card, values = [], []
    for arm, of in arms.items():
        mean = float(np.mean(of))
        row = Row(arm, place["risk"], place["split"], place["judge"], place["metric"], mean, mean, mean, len(of))
        card.append(vars(row))
        values.append({"arm": arm, **place, "values": list(map(float, of))})
    return card, values


def sweep(folder: Path, arms: dict[str, list[float]], place: dict, seeds: tuple[int, ...] = (0, 1)) -> Path:
    for seed in seeds:
        (folder / f"seed={seed}").mkdir(parents=True)
        (folder / f"seed={seed}" / "config.yaml").write_text(f"seed: {seed}\n")
        (folder / f"seed={seed}" / "run.json").write_text("{}")
        card, values = run(arms, place)
        Scorecard(Row(**row) for row in card).save(folder / f"seed={seed}" / "scorecard.json")
        (folder / f"seed={seed}" / "per_prompt.json").write_text(json.dumps(values))
    return folder


def first(count: int, of: int = 40) -> list[float]:
    """1 on so many prompts."""
    return [1.0] * count + [0.0] * (of - count)


def test_an_order_is_told_among_hundreds_of_tests():
    """Holm's first threshold of 18 pairs of orders in 14 figures is 0.05 / 252: sign flips must come below it."""
    random = np.random.default_rng(0)
    arms = {"a+b": random.uniform(0.1, 0.3, 200), "b+a": random.uniform(0.0, 0.1, 200), "base": np.ones(200)}
    card, values = run(arms, GAS)
    (line,) = contrasts.orders([card], [values])
    assert line["difference"]["p_value"] < 0.05 / 252


def test_the_rule_compares_a_patch_last_with_it_first_over_all_stacks():
    """Last 0.25 and 0.5 (mean 0.375), first 0.75 and 1, in the middle whatever; by seed and by hand."""
    stacks = {"x+toxicity": 10, "x+y+toxicity": 20, "toxicity+x": 30, "toxicity+x+y": 40, "x+toxicity+y": 7}
    arms = {"base": first(40), "toxicity": first(1)} | {arm: first(count) for arm, count in stacks.items()}
    same = {arm: first(20) for arm in arms}
    cards, values = zip(run(arms, TOX), run(same, TOX), strict=True)
    (line,) = contrasts.order_rule(cards, values)
    assert (line["risk"], line["one"], line["other"]) == ("toxicity", "toxicity last", "toxicity first")
    assert line["each"] == pytest.approx([-0.5, 0.0]) and line["difference"]["mean"] == pytest.approx(-0.25)
    assert line["differs"]
    told = interference.contrasts_table([line], "order_rule")
    assert "| toxicity last | toxicity first | toxic rate (svm) | -0.25 [" in told and "*" in told
    assert "(by seed: −, 0) |" in told


def test_a_joint_patch_is_compared_with_each_stack_of_all():
    arms = {"base": 40, "joint": 5, "a": 9, "b": 9, "a+b": 35, "b+a": 6}
    card, values = run({arm: first(count) for arm, count in arms.items()}, TOX)
    found = contrasts.joint_less_stacks([card], [values])
    assert [(of["one"], of["other"], of["differs"]) for of in found] == [
        ("joint", "a+b", True),
        ("joint", "b+a", False),
    ]
    assert found[0]["difference"]["mean"] == pytest.approx(-0.75)


def test_a_growing_stack_is_compared_with_itself_before():
    arms = {"base": 40, "a": 4, "b": 4, "c": 4, "a+b": 4, "a+b+c": 34}
    card, values = run({arm: first(count) for arm, count in arms.items()}, TOX)
    found = contrasts.growth([card], [values])
    assert [(of["one"], of["other"], of["differs"]) for of in found] == [("a+b", "a", False), ("a+b+c", "a+b", True)]
    orders = run({arm: first(3) for arm in ("base", "a", "b", "a+b", "b+a")}, TOX)
    assert contrasts.growth([orders[0]], [orders[1]]) == []


def test_a_policys_own_patch_is_what_its_column_is_compared_with():
    """Alone 4 of 40 break it, in company 20: 0.4 more; not compared with the base, nor with another policy's patch."""
    place = {"risk": "digits", "metric": "hit_rate", "judge": "policy", "split": "evaluation"}
    card, values = run({"base": first(40), "digits": first(4), "quotes": first(39), "quotes+digits": first(20)}, place)
    rows = {row["stack"]: row["cells"]["digits"] for row in interference.matrix([card], [values])}
    assert rows["quotes+digits"]["against"] == "digits" and rows["digits"]["against"] is None
    assert rows["quotes+digits"]["difference"]["mean"] == pytest.approx(0.4) and rows["quotes+digits"]["differs"]


def test_utility_is_compared_with_the_stacks_worst_patch_and_not_with_a_base_of_zero():
    """b costs 0.3 alone: 0.3 of the stack is what is to be expected; 0.9 with c, whose own is 0.1, is not."""
    arms = {"base": 0.0, "a": 0.1, "b": 0.3, "c": 0.1, "a+b": 0.3, "a+c": 0.9}
    noise = np.random.default_rng(1).normal(0, 0.01, (len(arms), 60))
    card, values = run({arm: x + noise[i] for i, (arm, x) in enumerate(arms.items())}, KL)
    rows = {row["stack"]: row["cells"]["KL, benign"] for row in interference.matrix([card], [values])}
    assert [rows[arm]["against"] for arm in ("base", "a", "b", "a+b")] == [None, None, None, "b"]
    assert "differs" not in rows["a"] and not rows["a+b"]["differs"] and rows["a+c"]["differs"]
    told = interference.differences(interference.matrix([card], [values]))
    assert "*" in told and "(b) |" in told


def test_cells_have_an_interval_over_prompts_of_the_mean_over_seeds():
    """Ten of 40 in either seed: an interval of about two standard errors (0.068); of perplexities the runs' own."""
    card, values = run({"base": first(10)}, TOX)
    (row,) = interference.matrix([card, card], [values, values])
    cell = row["cells"]["toxic rate (svm)"]
    assert 0.09 < cell["low"] < 0.16 and 0.34 < cell["high"] < 0.41
    ppl = {"risk": "utility", "metric": "text_ppl", "judge": None, "split": "wiki"}
    cards = [[vars(Row("base", *ppl.values(), 9.0, *ends, 40)) | ppl] for ends in ((8.0, 11.0), (7.0, 12.0))]
    cell = interference.matrix(cards, [run({"base": first(3)}, ppl)[1]] * 2)[0]["cells"]["text PPL"]
    assert (cell["low"], cell["high"]) == (7.5, 11.5)


def test_another_sweep_is_compared_arm_by_arm_and_with_its_specialist(tmp_path: Path):
    counts = {"base": 40, "toxicity": 4, "x+toxicity": 30}
    plain = sweep(tmp_path / "plain", {arm: first(n) for arm, n in counts.items()}, TOX, (0, 1, 2))
    ours = sweep(tmp_path / "ours", {arm: first(n) for arm, n in (counts | {"x+toxicity": 5}).items()}, TOX)
    options = [str(ours), "--out", str(tmp_path / "out"), "--against", str(plain)]
    result = CliRunner().invoke(interference.app, options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "matrix.json").read_text())["across"]
    assert [(of["one"], of["other"], round(of["difference"]["mean"], 3), of["differs"]) for of in found] == [
        ("toxicity", "toxicity", 0.0, False),
        ("x+toxicity", "x+toxicity", -0.625, True),
        ("x+toxicity", "toxicity", 0.025, False),
    ]
    assert "here less plain, seeds 0, 1" in result.stdout
    # 30 of 40 in company against 4 alone is a gap of 0.65; 5 of 40 leave 0.025 of it.
    (share,) = json.loads((tmp_path / "out" / "matrix.json").read_text())["closed"]
    assert (share["figure"], share["stacks"]) == ("toxic rate (svm)", 1)
    assert (share["reduction"], share["share"]) == pytest.approx((0.65, 0.625 / 0.65))
    assert 0.85 < share["low"] < share["share"] <= share["high"] <= 1
    assert "| toxic rate (svm) | 1 | +0.65 | 96% [" in result.stdout

    other = sweep(tmp_path / "other", {arm: first(n - 1) for arm, n in counts.items()}, TOX)
    result = CliRunner().invoke(interference.app, [*options[:-1], str(other)])
    assert "left out, as the base has other values in either: toxic rate (svm)" in result.stdout
    third = sweep(tmp_path / "third", {"base": first(40)}, TOX, (7,))
    result = CliRunner().invoke(interference.app, [*options[:-1], str(third)])
    assert isinstance(result.exception, PolicyPatchError) and "shares no seed" in str(result.exception)
    both = CliRunner().invoke(interference.app, [str(ours), str(plain), "--out", str(tmp_path / "out")])
    assert "another one by --against" in str(both.exception)


def test_a_second_set_of_a_risk_is_a_column_of_its_own():
    """GAS on the first set 0.25 and 0.5; on WinoBias, which stands behind it, 0.75 and 1."""
    wino = GAS | {"split": "winobias"}
    both = [run({"base": first(20), "a": first(10)}, GAS), run({"base": first(40), "a": first(30)}, wino)]
    rows = interference.matrix([[row for card, _ in both for row in card]], [[of for _, kept in both for of in kept]])
    means = {row["stack"]: {title: cell["mean"] for title, cell in row["cells"].items()} for row in rows}
    assert means == {
        "base": {"GAS (names)": 0.5, "GAS, WinoBias": 1.0},
        "a": {"GAS (names)": 0.25, "GAS, WinoBias": 0.75},
    }
