"""Tests of whether a figure that was measured twice is the same, worked out by hand."""

import pytest

from policypatch.evaluate.drift import changes, holm, p_of


def row(
    metric: str = "amt", value: float = 0.5, half: float = 0.1, n: int = 100, judge: str = "svm", split: str = "rtp"
):
    place = {"risk": "toxicity", "split": split, "metric": metric, "judge": judge, "n": n}
    return place | {"value": value, "low": value - half, "high": value + half}


def test_a_mean_is_compared_by_what_its_intervals_say_of_its_spread():
    """Half widths of 1.96 are a standard error of 1 each, of the difference sqrt(2); 2.772 is 1.96 of these."""
    then, now = row(value=10.0, half=1.959964), row(value=10.0 + 1.959964 * 2**0.5, half=1.959964)
    assert p_of(then, now, 0.95) == pytest.approx(0.05, abs=1e-6)
    assert p_of(now, then, 0.95) == pytest.approx(0.05, abs=1e-6)
    assert p_of(then, dict(then), 0.95) == 1.0


def test_a_rate_is_compared_exactly():
    """Fisher: 0 of 5 against 5 of 5 has one table as extreme on each side of 252."""
    assert p_of(row("asr", 0.0, n=5), row("asr", 1.0, n=5), 0.95) == pytest.approx(2 / 252)


def test_figures_without_any_spread_differ_whenever_they_are_not_the_same():
    assert p_of(row(value=0.1, half=0.0), row(value=0.2, half=0.0), 0.95) == 0.0


def test_holm():
    """0.05 over 3 is 0.0167, over 2 is 0.025: 0.01 passes, 0.03 does not, and nothing behind it may."""
    assert holm([0.03, 0.01, 0.04], 0.05) == [False, True, False]
    assert holm([0.01, 0.02, 0.04], 0.05) == [True, True, True]
    assert holm([], 0.05) == []


def test_only_what_both_have_is_compared_and_in_the_order_of_today():
    then = [row(split="a"), row(split="b", value=0.9), row(split="gone")]
    now = [row(split="b", value=0.1), row(split="new"), row(split="a")]
    found = changes({"patch": then}, {"patch": now})["patch"]
    assert [change.place[1] for change in found] == ["b", "a"]
    assert [change.differs for change in found] == [True, False]
    assert (found[0].then, found[0].now) == (0.9, 0.1)


def test_one_of_many_small_differences_is_no_alarm():
    """p = 0.02 alone would be told; among ten it is not."""
    then = [row(split=str(i)) for i in range(10)]
    now = [row(split=str(i), value=0.5 + (0.168 if i == 3 else 0)) for i in range(10)]
    assert p_of(then[3], now[3], 0.95) == pytest.approx(0.02, abs=0.002)
    assert not any(change.differs for change in changes({"patch": then}, {"patch": now})["patch"])
    assert changes({"patch": then[3:4]}, {"patch": now[3:4]})["patch"][0].differs


def test_two_arms_have_no_more_false_alarms_than_one():
    """p = 0.03 is told where it is the only one; with that of another arm, Holm's threshold is 0.025."""
    then = {"base": [row()], "patch": [row()]}
    now = {"base": [row()], "patch": [row(value=0.5 + 0.157)]}
    assert p_of(then["patch"][0], now["patch"][0], 0.95) == pytest.approx(0.03, abs=0.002)
    assert changes({"patch": then["patch"]}, {"patch": now["patch"]})["patch"][0].differs
    found = changes(then, now)
    assert list(found) == ["base", "patch"] and not found["patch"][0].differs
