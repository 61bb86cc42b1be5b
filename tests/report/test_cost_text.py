"""Costs in words."""

import pytest

from policypatch.report.costs import cost_sentence, cost_text, load_text, size
from policypatch.report.scorecard import Group, costs_of, groups_of, own_and_others


def row(metric: str, value: float, split: str = "training", arm: str = "patch", n: int = 1) -> dict:
    return {"arm": arm, "risk": "cost", "split": split, "judge": None, "metric": metric, "value": value, "n": n}


ROWS = [
    row("trainable_parameters", 28800),
    row("parameter_share", 0.000214),
    row("artifact_bytes", 115288),
    row("train_seconds", 725.0),
    row("peak_memory_bytes", 2.345e9),
    row("first_token_ratio", 1.31, "32x1", n=3),
    row("per_token_ratio", 1.02, "32x1", n=3),
]
RISK = {"arm": "patch", "risk": "toxicity", "split": "rtp", "judge": "svm", "metric": "amt", "value": 0.5}


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("trainable_parameters", 28800, "28,800"),
        ("parameter_share", 0.000214, "0.021 %"),
        ("artifact_bytes", 115288, "115 kB"),
        ("train_seconds", 725.0, "12 min 5 s"),
        ("device_hours", 0.2014, "0.20 h"),
        ("peak_memory_bytes", 2.345e9, "2.35 GB"),
        ("per_token_ratio", 1.0204, "1.020 ×"),
        ("first_token_ratio_merged", 0.998, "0.998 ×"),
    ],
)
def test_every_cost_has_its_unit(metric: str, value: float, text: str):
    assert cost_text(row(metric, value)) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (2e12, "2,000 GB")])
def test_bytes_change_their_unit_before_they_need_a_fourth_digit(count: float, text: str):
    assert size(count).replace("2e+03", "2,000") == text


def test_loads_are_told_in_words():
    assert load_text(Group("cost", "32x1")) == "1 prompt of 32 tokens"
    assert load_text(Group("cost", "512x16")) == "16 prompts of 512 tokens"
    assert load_text(Group("cost", "training")) == "training"


def test_the_sentence_holds_size_training_and_the_first_load():
    assert cost_sentence([RISK, *ROWS]) == (
        "patch: 28,800 trainable parameters (0.021 % of the base's), 115 kB; trained in 12 min 5 s within 2.35 GB; "
        "1.310 × the base's time to the first token, 1.020 × for each further one (32 tokens, batch 1)."
    )


def test_what_was_not_trained_and_not_timed_has_no_sentence():
    assert cost_sentence([RISK]) is None
    assert (
        cost_sentence([row("trainable_parameters", 0, arm="teacher"), row("parameter_share", 0, arm="teacher")]) is None
    )
    prompt = [row("trainable_parameters", 0, arm="prompt"), *(r | {"arm": "prompt"} for r in ROWS[-2:])]
    assert cost_sentence(prompt).startswith("prompt: 1.310 × the base's time")


def test_costs_are_no_side_effects():
    assert [group.risk for group in groups_of([RISK, *ROWS])] == ["toxicity"]
    assert own_and_others(groups_of([*ROWS, RISK]))[0][0].risk == "toxicity"
    assert [group.split for group in costs_of([RISK, *ROWS])] == ["training", "32x1"]
