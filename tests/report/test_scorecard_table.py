"""The terminal table and the headline: within 80 columns, and never rosier than the rows."""

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from policypatch.report.headline import headline, verdict
from policypatch.report.scorecard import effect_of
from policypatch.report.table import scorecard_table
from policypatch.report.wording import bound, number, percent


def _row(arm: str, metric: str, value: float | None, judge: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "risk": "toxicity",
        "split": "test",
        "metric": metric,
        "value": value,
        "judge": judge,
        **more,
    }


def _pair(
    before: float, after: float, judge: str | None, metric: str = "toxic_rate", **more: Any
) -> list[dict[str, Any]]:
    """Base and patch by one judge, with a difference that is clear unless told otherwise."""
    delta = after - before
    clear = {"delta": delta, "delta_low": delta - 0.01, "delta_high": delta + 0.01, "p_value": 0.001}
    return [
        _row("base", metric, before, judge, filter=more.get("filter", False)),
        _row("patch", metric, after, judge, **(clear | more)),
    ]


def _render(rows: list[dict[str, Any]], **options: float) -> str:
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(scorecard_table(rows, **options))
    return capture.get()


@pytest.mark.parametrize("arms", [2, 3, 4, 6])
def test_table_fits_80_columns_uncut(scorecard_rows: list[dict[str, Any]], arms: int) -> None:
    names = ["base", "patch", "sft", "teacher", "lora", "prompt"][:arms]
    extra = [{**row, "arm": arm} for row in scorecard_rows for arm in names[4:] if row["arm"] == "sft"]
    rows = [row for row in [*scorecard_rows, *extra] if row["arm"] in names]
    text = _render(rows)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for row in rows:
        if row["arm"] == "patch":
            assert number(row["value"]) in text


def test_table_folds_long_names(scorecard_rows: list[dict[str, Any]]) -> None:
    for row in scorecard_rows:
        if row["judge"]:
            row["judge"] = "organisation/a-rather-long-classifier-name"
    text = _render(scorecard_rows)
    assert all(len(line) <= 80 for line in text.splitlines()) and "…" not in text


def test_table_says_what_it_leaves_out_and_who_filtered(scorecard_rows: list[dict[str, Any]]) -> None:
    rows = scorecard_rows + [
        {**row, "arm": f"extra-{i}"} for row in scorecard_rows if row["arm"] == "sft" for i in range(4)
    ]
    text = _render(rows)
    assert "left out for width:" in text
    assert "lstm*" in text and "* had a part in training" in text


def test_markup_in_names_is_text() -> None:
    assert "[red]x" in _render([_row("base", "amt", 0.5, "[red]x")])


def test_the_own_risk_is_the_first_rows_and_speaks_alone() -> None:
    rows = _pair(0.6, 0.2, "svm") + [{**row, "risk": "gender_bias", "metric": "gas"} for row in _pair(0.5, 0.1, None)]
    text = _render(rows)
    assert text.index("toxicity · test") < text.index("side effects") < text.index("gender bias")
    assert headline(rows) == (
        "Toxic rate 0.60 → 0.20 by svm (had no part in training). "
        "Nothing else became measurably worse in 1 comparison (gender bias)."
    )
    assert headline(rows[2:] + rows[:2]).startswith("GAS 0.50 → 0.10. ")


def test_the_rest_is_one_line_each_within_80_columns_utility_last(
    scorecard_rows: list[dict[str, Any]], others: Callable[..., list[dict[str, Any]]]
) -> None:
    harder = [{**row, "split": "harder"} for row in scorecard_rows]
    lines = _render([*scorecard_rows, *others(), *harder]).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    text = "\n".join(line.rstrip() for line in lines)
    order = ["toxicity · test", "other prompts and side effects", " harder", "harmfulness", "gender bias", "utility"]
    assert [text.index(name) for name in order] == sorted(text.index(name) for name in order)
    [refusals] = [line.split() for line in lines if "over-refusal" in line]
    assert refusals == ["scary", "over-refusal", "refusal", "0.030", "0.14", "▲0.11", "✗"]
    [kl] = [line.split() for line in lines if "KL from base" in line]
    assert kl == ["benign", "KL", "from", "base", "–", "0.00", "0.083", "▲0.083"]


def test_an_arm_without_a_figure_has_a_dash_in_its_place() -> None:
    rows = [*_pair(0.6, 0.2, "svm"), _row("sft", "toxic_rate", 0.4, "svm"), *_pair(0.5, 0.4, None, "amt")]
    [line] = [line.split() for line in _render(rows).splitlines() if line.startswith("AMT")]
    assert line[:5] == ["AMT", "–", "0.50", "–", "0.40"]
    other = [{**row, "risk": "bias"} for row in _pair(0.5, 0.4, None, "gas")]
    assert "–" in next(line for line in _render(rows + other[:1]).splitlines() if "GAS" in line)[40:]


def test_headline_metrics_come_first_and_held_out_judges_before_filters(
    scorecard_rows: list[dict[str, Any]],
) -> None:
    names = [line.split()[:3] for line in _render(scorecard_rows).splitlines() if " svm " in line or " lstm* " in line]
    assert names == [
        ["toxic", "rate", "svm"],
        ["toxic", "rate", "lstm*"],
        ["AMT", "svm", names[2][2]],
        ["AMT", "lstm*", names[3][2]],
    ]


def test_headline_of_a_patch_that_works() -> None:
    rows = [
        *_pair(0.61, 0.24, "lstm", filter=True),
        *_pair(0.61, 0.24, "svm"),
        *_pair(12.1, 13.0, None, "ppl_median"),
    ]
    rows[-1] |= {"p_value": 0.2}
    assert headline(rows) == (
        "Toxic rate 0.61 → 0.24 by svm (had no part in training); median PPL 12.1 → 13.0. "
        "Nothing else became measurably worse in 1 comparison; no other risk was measured."
    )
    assert verdict(rows) == "better"


def test_the_bound_is_a_sentence_of_its_own_and_rounded_up() -> None:
    rows = _pair(0.61, 0.12, "svm", upper=0.1902)
    assert "training). With 95 % confidence the toxic rate on such prompts is below 0.20 (svm). " in headline(rows)
    assert "With 99 % confidence" in headline(rows, 0.99)
    assert "confidence" not in headline(_pair(0.61, 0.12, "svm"))
    asr = [{**row, "metric": "asr"} for row in rows]
    assert "the attack success rate on such prompts" in headline(asr)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.19, "0.19"),
        (0.1901, "0.20"),
        (0.0296, "0.030"),
        (0.0951, "0.096"),
        (0.0999, "0.10"),
        (0, "0.00"),
        (None, "–"),
    ],
)
def test_bound(value: object, text: str) -> None:
    assert bound(value) == text


def test_headline_of_a_worse_patch() -> None:
    rows = _pair(0.24, 0.61, "svm")
    assert headline(rows).startswith("Worse than the base: toxic rate 0.24 → 0.61 by svm")
    assert verdict(rows) == "worse"


def test_headline_claims_nothing_within_chance() -> None:
    rows = _pair(0.61, 0.59, "svm", delta_low=-0.06, delta_high=0.02, p_value=0.4)
    assert headline(rows) == (
        "No clear change: toxic rate 0.61 → 0.59 by svm (had no part in training; "
        "difference −0.020, 95 % interval −0.060 to +0.020). "
        "Nothing else could be compared; no other risk was measured."
    )
    assert verdict(rows) == "unclear"


def test_table_and_headline_name_the_level_of_the_intervals() -> None:
    rows = _pair(0.61, 0.59, "svm", low=0.5, high=0.7, delta_low=-0.06, delta_high=0.02, p_value=0.4)
    assert "[ ]: 95 % interval over prompts" in _render(rows)
    assert "[ ]: 90 % interval over prompts" in _render(rows, level=0.9)
    assert "difference −0.020, 99.9 % interval −0.060 to +0.020" in headline(rows, 0.999)


@pytest.mark.parametrize(("level", "text"), [(0.95, "95 %"), (0.9, "90 %"), (0.999, "99.9 %"), (0.57, "57 %")])
def test_percent(level: float, text: str) -> None:
    assert percent(level) == text


def test_headline_without_a_test_claims_nothing() -> None:
    rows = _pair(0.6, 0.2, "svm", delta_low=None, delta_high=None, p_value=None)
    assert "difference not tested" in headline(rows)


def test_headline_prefers_the_judge_that_did_not_filter_and_admits_where_none() -> None:
    rows = _pair(0.6, 0.1, "svm", filter=True)
    assert "(had a part in training)" in headline(rows)
    assert headline(rows + _pair(0.6, 0.3, "lstm")).startswith("Toxic rate 0.60 → 0.30 by lstm (had no part")


def test_headline_names_the_judge_that_disagrees() -> None:
    rows = _pair(0.6, 0.2, "svm") + _pair(0.5, 0.7, "lstm")
    assert "worse by lstm: 0.50 → 0.70" in headline(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [_row("base", "toxic_rate", 0.4, "svm")],
        [_row("base", "toxic_rate", None), _row("patch", "toxic_rate", 0.2)],
    ],
)
def test_headline_where_there_is_nothing_to_compare(rows: list[dict[str, Any]]) -> None:
    assert "nothing" in headline(rows)
    assert verdict(rows) == "none"
    scorecard_table(rows)


def test_an_unknown_metric_gets_no_verdict() -> None:
    rows = _pair(0.6, 0.2, None, "novel")
    assert headline(rows).startswith("Novel 0.60 → 0.20. ")
    assert verdict(rows) == "neutral"


@pytest.mark.parametrize(("level", "effect"), [(0.95, "better"), (0.99, "unclear"), (0.9, "better")])
def test_a_test_convinces_at_the_level_asked_for(level: float, effect: str) -> None:
    base, patch = _pair(0.6, 0.2, "svm", p_value=0.03)
    assert effect_of(patch, base, level) == effect
    assert verdict([base, patch], level) == effect


@pytest.mark.parametrize(
    ("before", "after", "low", "high", "effect"),
    [
        (0.62, 0.55, -0.10, -0.04, "better"),
        (0.38, 0.45, 0.04, 0.10, "better"),  # from the other side
        (0.65, 0.42, -0.28, -0.18, "better"),  # through the middle, and wholly nearer to it
        (0.60, 0.41, -0.24, -0.14, "unclear"),  # through the middle, perhaps as far beyond it
        (0.60, 0.30, -0.33, -0.27, "worse"),
        (0.55, 0.66, 0.08, 0.14, "worse"),
        (0.45, 0.30, -0.20, -0.10, "worse"),
        (0.55, 0.56, -0.01, 0.03, "unclear"),
    ],
)
def test_nearer_to_one_half_is_better(before: float, after: float, low: float, high: float, effect: str) -> None:
    base, patch = _pair(before, after, None, "crows_pairs", delta_low=low, delta_high=high)
    assert effect_of(patch, base) == effect


def test_the_divergence_from_the_base_is_never_called_worse() -> None:
    base, patch = _pair(0.0, 0.2, None, "kl_benign")
    assert effect_of(patch, base) == "neutral"


def test_both_pieces_of_evidence_must_agree() -> None:
    base, patch = _pair(0.6, 0.2, "svm", p_value=0.2)
    assert effect_of(patch, base) == "unclear"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.24, "0.24"),
        (12.14, "12.1"),
        (1234.5, "1,234"),
        (0.0341, "0.034"),
        (-0.37, "−0.37"),
        (0.0004, "0.0004"),
        (1e-6, "1e-06"),
        (9.999, "10.0"),
        (0, "0.00"),
        (None, "–"),
        (float("nan"), "–"),
        (True, "–"),
    ],
)
def test_number(value: object, text: str) -> None:
    assert number(value) == text
