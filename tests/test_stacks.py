"""Many stacks as arms of one run: which there are, that each is the concatenation, and what is measured of them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT, composed, overrides, patch_of
from typer.testing import CliRunner

from policypatch.data.teachers import BestOfN
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import Row, Scorecard
from policypatch.methods import StacksMethod
from policypatch.patch.artifact import load, save
from policypatch.pipeline import run

sys.path.insert(0, str(ROOT / "experiments"))
import interference

TEACHER = BestOfN(2, ["svm"], {"max_new_tokens": 4}, {})


@pytest.fixture
def patches(tiny_base, tmp_path: Path) -> dict[str, str]:
    """Three of 4, 3 and 2 vectors."""
    for name, start, length in (("tox", 4, 4), ("bias", 20, 3), ("harm", 40, 2)):
        save(patch_of(tiny_base, name, start, length), tmp_path / name)
    return {name: str(tmp_path / name) for name in ("tox", "bias", "harm")}


def test_every_order_of_every_choice(patches):
    method = StacksMethod(patches)
    names = [arm.name for arm in method.arms([TEACHER])]
    assert len(names) == 3 + 6 + 6 == len(set(names))
    assert names[:3] == ["tox", "bias", "harm"] and "harm+tox" in names and names[-1] == "harm+bias+tox"
    assert method.length == 9
    arms = {arm.name: arm.vectors for arm in method.arms([TEACHER])}
    assert torch.equal(arms["harm+tox"], torch.cat([load(patches[name]).vectors for name in ("harm", "tox")]))


def test_growing_stacks_and_others_beside_them(patches):
    method = StacksMethod({name: patches[name] for name in ("tox", "bias")}, "growing", {"joint": patches["harm"]})
    assert [arm.name for arm in method.arms([TEACHER])] == ["joint", "tox", "bias", "tox+bias"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (({},), "method.patches is empty"),
        (({"a": "."}, "every"), "method.which is 'every': choose orders or growing"),
        (({"a": "."}, "orders", {"a": "."}), "method.beside has a, as method.patches has"),
        (({"base": "."},), "method.patches calls a patch base"),
        (({"a+b": "."},), "choose a name without +"),
    ],
)
def test_what_is_no_list_of_stacks_is_told(arguments, told: str):
    with pytest.raises(PolicyPatchError, match=told):
        StacksMethod(*arguments)


def test_a_run_asks_every_stack_everything(patches, tiny_base_folder: Path, tmp_path: Path):
    given = {"method": "stacks", "+method.patches.tox": patches["tox"], "+method.patches.bias": patches["bias"]}
    arguments = overrides(tiny_base_folder, tmp_path, others="all", **given)
    card = run(composed(arguments), tmp_path / "run", "", arguments)
    stacks = ["tox", "bias", "tox+bias", "bias+tox"]
    assert list(dict.fromkeys(row.arm for row in card)) == ["base", *stacks]
    for arm in stacks:
        measured = {(row.risk, row.metric) for row in card if row.arm == arm}
        assert {("toxicity", "toxic_rate"), ("utility", "kl_benign"), ("harmfulness", "asr")} <= measured
        assert card.find(arm=arm, metric="artifact_bytes").value > 0
        assert any(row.metric == "first_token_ratio" and row.arm == arm for row in card)
        # Patches that were made before may have been trained against any risk.
        assert card.find(arm=arm, risk="gender_bias", metric="gld").filter
    assert (tmp_path / "run" / "report.html").exists()


def row(arm: str, value: float, risk: str = "toxicity", metric: str = "toxic_rate", judge: str | None = "svm") -> Row:
    return Row(arm, risk, "rtp", judge, metric, value, value, value, 40)


def line(arm: str, values: list[float], risk: str = "toxicity", metric: str = "toxic_rate", judge: str | None = "svm"):
    return {"arm": arm, "risk": risk, "split": "rtp", "judge": judge, "metric": metric, "values": values}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two seeds: the specialist has 0.1 and 0.2 of 40 prompts, with another before it 0.9 and 0.8."""
    for seed, (alone, both) in enumerate(((4, 36), (8, 32))):
        folder = tmp_path / "sweep" / f"seed={seed}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"seed: {seed}\n")
        (folder / "run.json").write_text("{}")
        rows = [row("base", 1.0), row("toxicity", alone / 40), row("bias+toxicity", both / 40)]
        rows += [row(arm, 0.5, "utility", "kl_benign", None) for arm in ("base", "bias+toxicity")]
        Scorecard(rows).save(folder / "scorecard.json")
        values = [line(arm, [1.0] * n + [0.0] * (40 - n)) for arm, n in (("base", 40), ("toxicity", alone))]
        values += [line("bias+toxicity", [1.0] * both + [0.0] * (40 - both))]
        (folder / "per_prompt.json").write_text(json.dumps(values))
    return tmp_path / "sweep"


def test_a_stack_is_compared_with_the_specialist_alone(sweep: Path, tmp_path: Path):
    """Means of 0.15 and 0.85; the 28 prompts that only the stack has in both seeds are no chance."""
    result = CliRunner().invoke(interference.app, [str(sweep), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert found["seeds"] == [0, 1]
    by_stack = {row["stack"]: row["cells"]["toxic rate (svm)"] for row in found["rows"]}
    assert by_stack["toxicity"]["mean"] == pytest.approx(0.15) and by_stack["toxicity"]["each"] == [0.1, 0.2]
    stack = by_stack["bias+toxicity"]
    assert stack["mean"] == pytest.approx(0.85) and stack["differs"]
    test = stack["difference"]
    assert test["p_value"] < 0.001 and test["mean"] == pytest.approx(0.7) and test["low"] < 0.7 < test["high"]
    assert f"| bias+toxicity | +0.7 [{test['low']:+.2g}, {test['high']:+.2g}]* |" in result.stdout
    assert "differs" not in by_stack["base"] and "differs" not in by_stack["toxicity"]
    cells = f"0.85* [{stack['low']:.2g}, {stack['high']:.2g}] (0.8 to 0.9) | 0.5? [0.5, 0.5] (0.5 to 0.5)"
    assert f"| bias+toxicity | {cells} |" in result.stdout
    assert (tmp_path / "out" / "matrix.png").read_bytes()[:4] == b"\x89PNG"


def test_a_figure_that_a_run_lacks_leaves_its_cell_empty():
    kl = vars(row("toxicity", 0.5, "utility", "kl_benign", None))
    cards = [
        [vars(row("base", 1.0)), vars(row("toxicity", 0.2)), kl],
        [vars(row("base", 1.0)), vars(row("toxicity", 0.4))],
    ]
    rows = interference.matrix(cards, [[], []])
    assert [set(row["cells"]) for row in rows] == [{"toxic rate (svm)"}] * 2
    assert rows[1]["cells"]["toxic rate (svm)"]["each"] == [0.2, 0.4]
    assert "| toxicity | 0.3 [0.3, 0.3] (0.2 to 0.4) |" in interference.table(rows)


def test_of_several_sets_the_first_speaks_in_every_run():
    """A second set's rows stand between, as they do in a scorecard: they are no further seeds."""
    arms, other = ("base", "toxicity", "bias+toxicity"), {"split": "bold"}
    cards = [[of for arm in arms for of in (vars(row(arm, v)), vars(row(arm, 9.0)) | other)] for v in (0.2, 0.4)]
    values = [[of for arm in arms for of in (line(arm, [1.0, 0.0]), line(arm, [0.0]) | other)] for _ in cards]
    rows = interference.matrix(cards, values)
    assert [row["cells"]["toxic rate (svm)"]["each"] for row in rows] == [[0.2, 0.4]] * 3
    assert rows[2]["cells"]["toxic rate (svm)"]["differs"] is False


def test_orders_of_the_same_patches_are_compared():
    """24 prompts that one order alone has are no chance; two of another column are."""
    ones = {"bias+tox": [1.0] * 30 + [0.0] * 10, "tox+bias": [1.0] * 6 + [0.0] * 34, "tox": [0.0] * 40}
    asr = {"bias+tox": [1.0] * 2 + [0.0] * 38, "tox+bias": [0.0] * 40}
    where = {"risk": "harmfulness", "metric": "asr", "judge": "refusal"}
    values = [line(arm, v) for arm, v in ones.items()] + [line(arm, v, **where) for arm, v in asr.items()]
    cards = [[vars(row(arm, 0.0)) for arm in ones] + [vars(row(arm, 0.0, **where)) for arm in asr]]
    found = interference.orders(cards, [values])
    assert [(of["one"], of["other"], of["figure"], of["differs"]) for of in found] == [
        ("bias+tox", "tox+bias", "toxic rate (svm)", True),
        ("bias+tox", "tox+bias", "ASR (refusal)", False),
    ]
    assert found[0]["difference"]["mean"] == pytest.approx(0.6)
    told = interference.contrasts_table(found)
    assert "difference (of 2 compared)" in told and "| bias+tox | tox+bias | toxic rate (svm) | +0.6 [" in told
    ppl = {"differs": True, "difference": {"mean": 0.095, "low": 0.0, "high": 0.182, "p_value": 0.01}}  # logarithms
    found[1] |= {"figure": "median PPL"} | ppl
    assert "| median PPL | ×1.10 [×1.00, ×1.20]* |" in interference.contrasts_table(found)
    found[1]["differs"] = False
    assert "ASR" not in told and "none differ" in interference.contrasts_table(found[1:])


def test_where_the_specialist_is_no_arm_that_is_shown():
    rows = interference.matrix([[vars(row("base", 1.0)), vars(row("tox+bias", 0.2))]], [[line("tox+bias", [1.0, 0.0])]])
    assert "| tox+bias | 0.2? [0, 1] |" in interference.table(rows)


def test_a_sweep_without_a_finished_run_is_told(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    result = CliRunner().invoke(interference.app, [str(tmp_path), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, PolicyPatchError) and "no finished run" in str(result.exception)
