"""What share of a reduction is kept, by hand, and when nothing can be said of it."""

import numpy as np
import pytest

from policypatch.evaluate.kept import Kept, kept
from policypatch.evaluate.measure import Settings

PLACE = {"risk": "toxicity", "split": "rtp", "judge": "svm"}


def lines(metric: str = "toxic_rate", **arms: list[float | None]) -> list[dict]:
    return [PLACE | {"metric": metric, "arm": arm, "values": values} for arm, values in arms.items()]


def of(now: list[dict], then: list[dict] | None = None, metrics: tuple[str, ...] = ("toxic_rate", "amt")) -> list[Kept]:
    return kept(now, "short", now if then is None else then, "stack", metrics, Settings(resamples=500))


def first(count: int, n: int = 20) -> list[float]:
    return [1.0] * count + [0.0] * (n - count)


def test_the_share_of_a_mean_reduction_and_its_interval_over_prompts():
    """Base 20 of 20, stack 4, short 8: 12 of 16. Where short fails is drawn with the prompt: 0.75 lies within."""
    values = lines(base=first(20), stack=first(4), short=first(8))
    values += lines("ppl_median", base=first(3), stack=first(1), short=first(2))
    (found,) = of(values)
    assert found.place == ("toxicity", "rtp", "toxic_rate", "svm")
    assert (found.share, found.reduction) == (pytest.approx(0.75), pytest.approx(0.8))
    assert 0.45 < found.low < 0.7 and 0.8 < found.high < 1
    assert found.told().startswith("75% [") and found.to_json()["metric"] == "toxic_rate"


def test_it_is_paired_prompts_in_common_cancel():
    """Whatever each prompt's value: behind short it is always half way, so that every draw keeps one half."""
    base = np.random.default_rng(0).uniform(0.2, 1, 40)
    (found,) = of(lines("amt", base=list(base), stack=list(base / 3), short=list(base * 2 / 3)))
    assert (found.share, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_of_a_reduction_that_is_not_told_from_none_there_is_no_interval():
    (found,) = of(lines(base=first(3), stack=first(2), short=first(3)))
    assert found.share == 0 and found.low is None and "not told from none" in found.told()
    assert of(lines(base=first(3), stack=first(5), short=first(0))) == []


def test_two_bases_are_paired_by_prompt_and_one_without_a_value_is_left_out():
    """Then 1 -> 0 on both prompts that have a value, now 1 -> 0.5."""
    then = lines("amt", base=[1.0, 1.0, 1.0], stack=[0.0, None, 0.0])
    (found,) = of(lines("amt", base=[1.0, 0.0, 1.0], short=[0.5, 0.9, 0.5]), then)
    assert found.share == pytest.approx(0.5) and found.low == pytest.approx(0.5)
    assert of(lines("amt", base=[1.0], short=[0.5]), then) == []  # other prompts
