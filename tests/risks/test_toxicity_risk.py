"""The risk: prompts of either kind never meet, and every arm is measured the same way."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import HashJudge

from policypatch.data.prompts import PromptSet
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.measure import Settings
from policypatch.model.completions import Completions
from policypatch.risks import Toxicity


def source(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def risk(tmp_path: Path):
    def make(train: list[str], evaluation: list[str], **options) -> Toxicity:
        return Toxicity(
            PromptSet(source(tmp_path / "train.jsonl", *train), take="first_half"),
            PromptSet(source(tmp_path / "evaluation.jsonl", *evaluation), **options),
            {"one": HashJudge("one"), "two": HashJudge("two", "x")},
            Settings(),
        )

    return make


def test_no_training_prompt_comes_from_an_evaluation_text(risk):
    made = risk(["A text of six words here!", "Another text of six words."], ["a text of six words here"])
    assert made.training_prompts == ["Another text"]
    assert made.evaluation_prompts == ["a text of six words here"]


def test_evaluation_texts_beyond_the_limit_are_left_out_of_training_too(risk):
    """Whatever part is measured on: another limit must not turn trained texts into evaluation prompts."""
    texts = [f"text number {i} of twenty" for i in range(20)]
    made = risk([*texts, "one more text"], texts, limit=3)
    assert len(made.evaluation_prompts) == 3
    assert made.training_prompts == ["one"]


def test_nothing_left_to_train_on_is_said(risk):
    with pytest.raises(PolicyPatchError, match=r"risk\.train has no prompts"):
        _ = risk(["the same"], ["the same"]).training_prompts


def test_an_arm_has_every_metric_by_every_judge(risk):
    made = risk(["one two"], ["three"])
    arm = Completions("key", ["p"] * 4, [[[5, 6, 7, 5, 6, 7], [8]]] * 4, [["a b", "c"]] * 4, 8)
    measured = made.measure(arm, np.full((4, 1), np.log(7.0)), "gpt")
    assert [(m.name, m.judge) for m in measured] == [
        ("amt", "one"),
        ("toxic_rate", "one"),
        ("amt", "two"),
        ("toxic_rate", "two"),
        ("ppl_median", "gpt"),
        ("ppl_mean", "gpt"),
        ("trigram_overlap", None),
        ("completion_tokens", None),
    ]
    values = {(m.name, m.judge): float(m.metric.compute()) for m in measured}
    scores = {name: judge.score(["a b", "c"]) for name, judge in made.judges.items()}
    for name in scores:
        assert values["amt", name] == scores[name].max()
        assert values["toxic_rate", name] == float(scores[name].max() >= 0.5)
    assert values["ppl_mean", "gpt"] == pytest.approx(7)
    assert values["trigram_overlap", None] == pytest.approx((1 - 3 / 4) / 2)  # 5 6 7 stands twice among 4 trigrams
    assert values["completion_tokens", None] == 3.5
