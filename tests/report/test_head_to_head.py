"""The other methods against the patch, prompt by prompt, on values made by hand."""

import json
from pathlib import Path

import pytest
from test_compare import TOXIC, write

from policypatch.evaluate.scorecard import PER_PROMPT
from policypatch.report.compare import compare
from policypatch.report.compare_lines import comparison
from policypatch.report.head_to_head import head_to_head
from policypatch.report.records import find_records


def prompt_values(run: Path, arm: str, values: list[float], base: list[float], metric: str = "toxic_rate") -> None:
    about = {"risk": "toxicity", "split": "rtp", "metric": metric, "judge": "svm"}
    rows = [about | {"arm": name, "values": list(v)} for name, v in (("base", base), (arm, values))]
    (run / PER_PROMPT).write_text(json.dumps(rows))


@pytest.fixture
def methods(tmp_path: Path) -> Path:
    """A patch and LoRA under two seeds on eight prompts; LoRA hits two more prompts than the patch under either."""
    patch = {0: [1, 0, 0, 0, 0, 0, 0, 0], 1: [0, 1, 0, 0, 0, 0, 0, 0]}
    for seed, ours in patch.items():
        theirs = [*ours[:6], 1, 1]
        for name, values in (("patch", ours), ("lora", theirs)):
            run = write(tmp_path / f"{name},{seed}", {"method.name": name, "seed": seed}, sum(values) / 8, name)
            prompt_values(run, name, values, [1] * 8)
    return tmp_path


def test_methods_are_compared_with_the_patch_prompt_by_prompt(methods: Path):
    """The mean over seeds differs at two of eight prompts by 1: 0.25; two differences of one sign, p = 2 / 2**2."""
    found = head_to_head(comparison(find_records([methods])))
    assert found is not None and [line.arm for line in found.lines] == ["lora"]
    difference = found.differences[0, TOXIC]
    assert (difference.mean, difference.p_value) == pytest.approx((0.25, 0.5))
    compare([methods], methods)
    text = (methods / "compare.md").read_text()
    assert "## Against the patch" in text and "| lora | +0.25 [" in text
    page = (methods / "compare.html").read_text()
    assert "Against the patch" in page and 'data-sort="+0.25">+0.25 [' in page  # it sorts by the figure


def test_runs_on_other_prompts_are_not_paired(methods: Path):
    for seed in (0, 1):
        prompt_values(methods / f"lora,{seed}", "lora", [1] * 8, [0, *[1] * 7])
    assert head_to_head(comparison(find_records([methods]))) is None


def test_a_prompt_without_a_value_is_left_out_and_an_arm_without_any_is_not_compared(methods: Path):
    nothing = [None] * 8
    for seed in (0, 1):
        prompt_values(methods / f"lora,{seed}", "lora", nothing, [1] * 8)
    assert head_to_head(comparison(find_records([methods]))) is None
    for seed in (0, 1):
        prompt_values(methods / f"lora,{seed}", "lora", [None, 1, *[0] * 6], [1] * 8)
    found = head_to_head(comparison(find_records([methods])))
    assert found.differences[0, TOXIC].mean == pytest.approx((1 - 0.5) / 7)


def test_without_another_method_there_is_nothing_against_the_patch(tmp_path: Path):
    for length in (1, 10):
        write(tmp_path / str(length), {"patch.length": length}, 0.2)
    assert head_to_head(comparison(find_records([tmp_path]))) is None
