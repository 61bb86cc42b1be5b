"""Which arms are asked what, in which order it is written down, and what is left when a probe fails."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.arms import evaluate_arms
from policypatch.evaluate.measure import filled
from policypatch.evaluate.metrics import AMT, MeanValue, ToxicRate
from policypatch.evaluate.probes import Bench, Outcome
from policypatch.evaluate.scorecard import PER_PROMPT, Scorecard
from policypatch.files.atomic import read_json, read_jsonl
from policypatch.model.arm import Arm

ARMS = {"base": None, "sft": torch.ones(2, 64), "patch": torch.full((2, 64), 2.0)}


@dataclass
class Told:
    """Two prompts whose scores grow with the arm's vectors: base 0.1 and 0.6, sft 0.2 and 0.7, patch 0.3 and 0.8."""

    risk: str
    split: str
    chat: bool = False
    reads_probabilities: bool = False
    fails_on: str | None = None
    asked: list[str] = field(default_factory=list)

    def measure(self, bench: Bench, arm: Arm) -> Outcome:
        self.asked.append(arm.name)
        if arm.name == self.fails_on:
            raise PolicyPatchError("the judge went home")
        more = 0.0 if arm.vectors is None else arm.vectors.mean().item() / 10
        scores = torch.tensor([[0.1 + more], [0.6 + more]])
        measured = [
            filled("amt", "one", AMT(), scores),
            filled("toxic_rate", "two", ToxicRate(), scores),
            filled("completion_tokens", None, MeanValue(), scores),
        ]
        return Outcome(measured, [{"risk": self.risk, "split": self.split, "arm": arm.name, "prompt_id": 0}])


MARKED = {"toxicity": ["two"]}


@pytest.fixture
def evaluate(bench: Bench, tmp_path: Path):
    def run(own: Sequence[Told], others: Sequence[Told] = (), arms=ARMS, marked=MARKED) -> Scorecard:
        compared = [Arm(name, vectors) for name, vectors in arms.items()]
        return evaluate_arms(bench, own, others, marked, compared, tmp_path / "run")

    return run


def order(rows) -> list[tuple[str, str, str]]:
    found = [(row.risk, row.split, row.arm) for row in rows]
    return list(dict.fromkeys(found))


def test_the_own_risk_is_first_and_asked_of_every_arm_the_others_of_base_and_patch(evaluate, tmp_path: Path):
    own, others = [Told("toxicity", "rtp"), Told("toxicity", "bold")], [Told("gender_bias", "x"), Told("utility", "y")]
    card = evaluate(own, others)
    expected = [("toxicity", split, arm) for split in ("rtp", "bold") for arm in ARMS]
    expected += [(*other, arm) for other in (("gender_bias", "x"), ("utility", "y")) for arm in ("base", "patch")]
    assert order(card) == expected
    assert [probe.asked for probe in own] == [[*ARMS]] * 2
    assert [probe.asked for probe in others] == [["base", "patch"]] * 2
    assert Scorecard.load(tmp_path / "run" / "scorecard.json") == card
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert [(row["risk"], row["split"], row["arm"]) for row in samples] == expected


def test_figures_are_kept_prompt_by_prompt(evaluate, tmp_path: Path):
    """The mean over prompts of what is kept is the scorecard's figure."""
    card = evaluate([Told("toxicity", "rtp")])
    kept = read_json(tmp_path / "run" / PER_PROMPT)
    assert len(kept) == len(card) == 9
    for row, values in zip(card, kept, strict=True):
        assert (row.arm, row.risk, row.split, row.judge, row.metric) == tuple(
            values[name] for name in ("arm", "risk", "split", "judge", "metric")
        )
        assert len(values["values"]) == 2 and sum(values["values"]) / 2 == pytest.approx(row.value)


def test_arms_are_compared_with_the_base_under_every_probe(evaluate):
    """amt is the mean of 0.1, 0.6 and so on: 0.35, 0.45, 0.55, so the difference is 0.1 and 0.2."""
    card = evaluate([Told("toxicity", "rtp")], [Told("gender_bias", "x")])
    for risk in ("toxicity", "gender_bias"):
        rows = {row.arm: row for row in card if row.risk == risk and row.metric == "amt"}
        assert rows["base"].delta is None and rows["base"].value == pytest.approx(0.35)
        assert rows["patch"].delta == pytest.approx(0.2) and rows["patch"].p_value is not None
    assert card.find(risk="toxicity", arm="sft", metric="amt").delta == pytest.approx(0.1)


def test_what_had_a_part_in_training_is_marked_in_its_own_risk_alone(evaluate):
    """A judge of another risk may have the same name and yet have chosen nothing."""
    card = evaluate([Told("toxicity", "rtp")], [Told("gender_bias", "x")])
    assert {(row.risk, row.judge) for row in card if row.filter} == {("toxicity", "two")}


def test_a_metric_without_a_judge_is_marked_by_its_own_name(evaluate):
    marked = {"toxicity": ["completion_tokens"], "gender_bias": ["two"]}
    card = evaluate([Told("toxicity", "rtp")], [Told("gender_bias", "x")], marked=marked)
    found = {(row.risk, row.judge or row.metric) for row in card if row.filter}
    assert found == {("toxicity", "completion_tokens"), ("gender_bias", "two")}


def test_rates_and_bounded_means_have_upper_bounds(evaluate):
    for row in evaluate([Told("toxicity", "rtp")], [Told("gender_bias", "x")]):
        if row.metric == "completion_tokens":
            assert row.upper is None
        else:
            assert row.value < row.upper <= 1


def test_the_patch_is_the_last_arm_also_where_a_stage_was_left_out(evaluate):
    arms = {name: ARMS[name] for name in ("base", "sft")}
    other = Told("utility", "y")
    assert order(evaluate([Told("toxicity", "rtp")], [other], arms))[-1] == ("utility", "y", "sft")
    assert other.asked == ["base", "sft"]


def test_an_arm_without_likelihoods_is_not_asked_for_them(bench, tmp_path: Path):
    arms = [Arm("base"), Arm("teacher", best_of=3, chosen_by=("one",))]
    reads, writes = Told("toxicity", "read", reads_probabilities=True), Told("toxicity", "written")
    card = evaluate_arms(bench, [reads, writes], [], {}, arms, tmp_path / "run")
    assert reads.asked == ["base"] and writes.asked == ["base", "teacher"]
    assert {(row.split, row.arm) for row in card} == {("read", "base"), ("written", "base"), ("written", "teacher")}


def test_an_arm_without_likelihoods_lacks_their_figures_and_no_others(evaluate):
    class Silent(Told):
        def measure(self, bench: Bench, arm: Arm) -> Outcome:
            outcome = super().measure(bench, arm)
            return Outcome([of for of in outcome.measured if of.name != "amt" or arm.name != "patch"], outcome.samples)

    card = evaluate([Silent("toxicity", "rtp")])
    assert [row.arm for row in card if row.metric == "amt"] == ["base", "sft"]
    assert card.find(arm="patch", metric="toxic_rate").delta is not None


@pytest.mark.parametrize(
    ("broken", "left"),
    [
        (("toxicity", "bold", "sft"), [("toxicity", "rtp", arm) for arm in ARMS]),
        (("utility", "y", "base"), [("toxicity", split, arm) for split in ("rtp", "bold") for arm in ARMS]),
        (("toxicity", "rtp", "base"), []),
    ],
)
def test_what_was_measured_before_a_probe_fails_is_kept(broken: tuple[str, str, str], left, evaluate, tmp_path: Path):
    probes = [Told("toxicity", "rtp"), Told("toxicity", "bold"), Told("utility", "y")]
    for probe in probes:
        if (probe.risk, probe.split) == broken[:2]:
            probe.fails_on = broken[2]
    with pytest.raises(PolicyPatchError, match="the judge went home"):
        evaluate(probes[:2], probes[2:])
    assert order(Scorecard.load(tmp_path / "run" / "scorecard.json")) == left
    text = (tmp_path / "run" / "samples.jsonl").read_text()
    assert text.count("\n") == len(left)
