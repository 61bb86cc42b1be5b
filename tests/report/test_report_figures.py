"""The figures: SVG with text as text, page colours, and every number accounted for."""

import xml.etree.ElementTree as ET

from policypatch.report.drawing import arm_styles
from policypatch.report.figures import loss_curves, score_distributions


def _metrics(stage: str, metric: str, values: list[float]) -> list[dict[str, object]]:
    return [{"stage": stage, "step": i, "metric": metric, "value": value} for i, value in enumerate(values)]


def test_panels_are_well_formed_with_text_and_page_colours() -> None:
    [panel] = loss_curves(_metrics("sft", "train/loss", [3.0, 2.0, 1.5]) + _metrics("sft", "val/loss", [3.1, 2.2, 1.9]))
    root = ET.fromstring(panel.svg)
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "step" in texts
    assert "var(--arm-sft" in panel.svg and "var(--muted" in panel.svg
    assert "<style" not in panel.svg and "font-family: " not in panel.svg
    assert root.attrib["aria-label"] == "SFT loss by step: train from 3 to 1.5; val from 3.1 to 1.9"
    assert "width" not in root.attrib


def test_one_panel_for_each_stage_and_metric_in_order() -> None:
    rows = [
        row
        for stage, metric in [
            ("dpo", "train/odd"),
            ("dpo", "train/loss"),
            ("dpo", "val/loss"),
            ("sft", "train/loss"),
        ]
        for row in _metrics(stage, metric, [1.0, 0.5])
    ]
    assert [panel.title for panel in loss_curves(rows)] == ["SFT loss", "DPO loss", "DPO odd"]


def test_values_that_are_not_finite_are_counted() -> None:
    [panel] = loss_curves(_metrics("dpo", "train/loss", [1.0, float("nan"), float("inf")]))
    assert panel.note.startswith("2 values")
    [empty] = loss_curves(_metrics("dpo", "train/loss", [float("nan")]))
    assert "no finite value" in empty.svg


def test_the_distribution_tells_the_toxic_rate() -> None:
    [panel] = score_distributions({"svm": {"base": [0.1, 0.5, 0.9, 0.95], "patch": [0.1, 0.2, 0.3, 0.6]}})
    assert panel.title == "svm"
    assert 'aria-label="svm, share of prompts at or above 0.5: base 0.75, patch 0.25"' in panel.svg


def test_the_distribution_tells_the_toxic_rate_at_the_threshold_of_the_run() -> None:
    [panel] = score_distributions({"svm": {"base": [0.1, 0.5, 0.9, 0.95]}}, 0.9)
    assert 'aria-label="svm, share of prompts at or above 0.9: base 0.50"' in panel.svg


def test_scores_that_are_no_probabilities_get_their_own_range() -> None:
    [panel] = score_distributions({"logit": {"base": [-3.0, 2.0, 7.0]}})
    assert "base median 2" in panel.svg
    assert score_distributions({"flat": {"base": [2.0, 2.0]}})


def test_names_are_escaped_and_never_mathematics() -> None:
    [panel] = score_distributions({'a"<b>$x$': {"base": [0.1, 0.2]}})
    ET.fromstring(panel.svg)
    [panel] = loss_curves(_metrics("<sft>", 'train/$a_b$"<i>', [1.0, 2.0]))
    ET.fromstring(panel.svg)


def test_every_arm_has_a_colour_and_a_known_arm_always_the_same() -> None:
    assert arm_styles(["base", "patch"])["patch"] == arm_styles(["patch"])["patch"]
    styles = arm_styles(["base", "sft", "lora", "prompt", "patch", "teacher"])
    assert len({style.variable for style in styles.values()}) == 6


def test_equal_input_gives_equal_output() -> None:
    rows = _metrics("dpo", "train/loss", [float(i % 7) for i in range(100)])
    assert loss_curves(rows) == loss_curves(rows)
