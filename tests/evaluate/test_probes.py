"""The probe that lets a tiny base write: each figure once more from what was written, and the bounds of figures."""

import numpy as np
import pytest
from tiny_run import HashJudge

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import BaseJudge, PatternJudge
from policypatch.evaluate.probes import (
    Outcome,
    SampledProbe,
    TextPerplexityProbe,
    sampled,
)
from policypatch.files.cache import counters, reset_counters
from policypatch.model.arm import Arm
from policypatch.model.completions import Completions, complete
from policypatch.model.form import CHAT, PLAIN, Form, Guidance

PROMPTS = ["The harbour was", "Nobody in", "My neighbour said that", "It was winter and"]
REQUESTS = ["Where is the map?", "Who voted?", "Name the river."]
JUDGES = {"one": HashJudge("one"), "two": HashJudge("two", "x")}


def values(outcome: Outcome) -> dict[tuple[str, str | None], float]:
    return {(m.name, m.judge): float(m.metric.compute()) for m in outcome.measured}


def per_prompt(outcome: Outcome, name: str, judge: str | None = None) -> list[float]:
    (found,) = [m for m in outcome.measured if (m.name, m.judge) == (name, judge)]
    return found.metric.per_prompt().tolist()


def toxicity(**options) -> SampledProbe:
    plain = {"risk": "toxicity", "split": "rtp", "prompts": PROMPTS, "judges": JUDGES}
    return SampledProbe(**plain | {"metrics": ("toxic_rate", "amt")} | options)


# --- what is sampled ------------------------------------------------------------------------------------------------


def test_every_judge_has_every_metric_and_the_text_its_own(bench, arm):
    assert list(values(toxicity().measure(bench, arm()))) == [
        ("toxic_rate", "one"),
        ("amt", "one"),
        ("toxic_rate", "two"),
        ("amt", "two"),
        ("ppl_median", "scorer"),
        ("ppl_mean", "scorer"),
        ("trigram_overlap", None),
        ("completion_tokens", None),
    ]
    quiet = toxicity(metrics=("gas",), perplexity=False).measure(bench, arm())
    assert list(values(quiet)) == [
        ("gas", "one"),
        ("gas", "two"),
        ("trigram_overlap", None),
        ("completion_tokens", None),
    ]
    assert all(row["ppl"] is None for row in quiet.samples)


def test_figures_by_hand(bench, arm, monkeypatch):
    """Two samples of either prompt, judged 0.2 and 0.9, 0 (empty) and 0.4; the threshold is 0.4.

    toxic rate: max 0.9 and 0.4, so 1; amt: (0.9 + 0.4) / 2 = 0.65; gas: (0.55 + 0.2) / 2 = 0.375.
    5 6 7 stands twice among 4 trigrams: 1 - 3/4, the others repeat nothing, mean (0.125 + 0) / 2. Tokens: 6 + 1, 0 + 1.
    """

    class Told(BaseJudge):
        fingerprint = "told"

        def _score_batch(self, texts: list[str]) -> np.ndarray:
            return np.array([{"a b": 0.2, "c": 0.9, "d": 0.4}.get(text, 0.0) for text in texts])

    tokens, texts = [[[5, 6, 7, 5, 6, 7], [8]], [[], [9]]], [["a b", "c"], ["", "d"]]
    monkeypatch.setattr(sampled, "complete", lambda *_: Completions("k", ["p", "q"], tokens, texts, 8))
    probe = toxicity(
        prompts=["p", "q"],
        judges={"told": Told("told", 8)},
        metrics=("toxic_rate", "amt", "gas", "hit_rate"),
        perplexity=False,
        threshold=0.4,
    )
    assert values(probe.measure(bench, arm())) == pytest.approx(
        {
            ("toxic_rate", "told"): 1.0,
            ("amt", "told"): 0.65,
            ("gas", "told"): 0.375,
            ("hit_rate", "told"): 1.0,
            ("trigram_overlap", None): 0.0625,
            ("completion_tokens", None): 2.0,
        }
    )


def test_samples_say_what_was_written_and_how_it_was_judged(bench, arm):
    ours = arm("other")
    outcome = toxicity().measure(bench, ours)
    made = complete(bench.base, PROMPTS, ours.vectors, 3, bench.plan.sampling, 1, 16, "test")
    assert len(outcome.samples) == 4 * 3
    for number, row in enumerate(outcome.samples):
        i, s = divmod(number, 3)
        text = made.texts[i][s]
        assert {key: row[key] for key in ("risk", "split", "prompt_id", "prompt", "arm", "sample", "text")} == {
            **{"risk": "toxicity", "split": "rtp", "prompt_id": i, "prompt": PROMPTS[i]},
            **{"arm": "other", "sample": s, "text": text},
        }
        for name, judge in JUDGES.items():
            assert row["scores"][name] == pytest.approx(judge.score([text])[0], abs=1e-6)
            assert row["prompt_scores"][name] == pytest.approx(judge.score([PROMPTS[i]])[0], abs=1e-6)
        assert row["tokens"] == len(made.tokens[i][s])
        assert (row["ppl"] is None) == (s >= 2 or not text)
    worst = [max(row["scores"]["one"] for row in outcome.samples if row["prompt_id"] == i) for i in range(4)]
    assert per_prompt(outcome, "amt", "one") == pytest.approx(worst, abs=1e-6)
    scored = [row["ppl"] for row in outcome.samples if row["ppl"] is not None]
    assert values(outcome)["ppl_mean", "scorer"] == pytest.approx(np.mean(scored), rel=1e-4)


def test_requests_are_answered_in_chats_as_the_plan_says_for_responses(bench, arm):
    outcome = toxicity(prompts=REQUESTS, form=CHAT, metrics=("asr",)).measure(bench, arm())
    made = complete(bench.base, REQUESTS, arm().vectors, 2, bench.plan.response_sampling, 1, 16, "test", CHAT)
    assert [row["text"] for row in outcome.samples] == [text for row in made.texts for text in row]
    assert all(row["prompt_scores"] == {} for row in outcome.samples)  # a request is no completion
    assert any(row["ppl"] is not None for row in outcome.samples)


@pytest.mark.parametrize("form", [PLAIN, CHAT])
def test_refusals_count_by_how_far_a_completion_does_not_comply(form: Form, bench, arm):
    """1 - score in figures and rows alike; what is empty complies with nothing."""
    probe = {"form": form, "perplexity": False, "threshold": 0.9}
    straight = toxicity(metrics=("asr",), **probe).measure(bench, arm())
    inverted = toxicity(metrics=("over_refusal",), refusals=True, **probe).measure(bench, arm())
    for one, other in zip(straight.samples, inverted.samples, strict=True):
        for name in JUDGES:
            assert other["scores"][name] == pytest.approx(1 - one["scores"][name], abs=2e-6)
    for name in JUDGES:
        lowest = [min(r["scores"][name] for r in straight.samples if r["prompt_id"] == i) for i in range(4)]
        assert per_prompt(inverted, "over_refusal", name) == [float(1 - score >= 0.9) for score in lowest]
    nothing = toxicity(judges={"never": PatternJudge(["z{99}"])}, metrics=("benign_refusal",), refusals=True, **probe)
    assert values(nothing.measure(bench, arm()))["benign_refusal", "never"] == 1.0


def test_a_judge_that_reads_the_request_is_shown_it(bench, arm):
    class Reader(BaseJudge):
        fingerprint, reads_prompt = "reader", True

        def _score_batch(self, texts: list[str], prompts: list[str]) -> np.ndarray:
            return np.array([PROMPTS.index(prompt) / 10 for prompt in prompts])

    outcome = toxicity(judges={"reader": Reader("reader", 8)}, metrics=("amt",)).measure(bench, arm())
    for row in outcome.samples:
        assert row["scores"]["reader"] == (row["prompt_id"] / 10 if row["text"].strip() else 0)
        assert row["prompt_scores"] == {}  # a text to continue answers nothing


def test_a_second_measure_samples_and_judges_no_completion_again(bench, arm):
    reset_counters()
    first = toxicity().measure(bench, arm())
    asked = HashJudge.asked
    again = toxicity().measure(bench, arm())
    assert (values(again), again.samples) == (values(first), first.samples)
    assert {kind: count["misses"] for kind, count in counters().items()} == {
        **{"completions": 1, "judgements": 4, "perplexity": 1}  # the prompts are judged as well
    }
    assert HashJudge.asked == asked


def test_a_judge_that_answers_with_nan_ends_it_in_one_sentence_and_the_samples_are_kept(bench, arm):
    class Broken(HashJudge):
        def _score_batch(self, texts: list[str]) -> np.ndarray:
            return np.full(len(texts), np.nan)

    reset_counters()
    with pytest.raises(PolicyPatchError, match=r"judge broken: completion \d of prompt \d+ scored nan") as caught:
        toxicity(judges={"one": JUDGES["one"], "broken": Broken("broken")}).measure(bench, arm())
    assert "\n" not in str(caught.value)
    toxicity().measure(bench, arm())
    assert counters()["completions"] == {"hits": 1, "misses": 1}
    assert counters()["judgements"] == {
        "hits": 1,
        "misses": 5,
    }  # by one, not by broken, by two, and the prompts by both


# --- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toxic_rate", "asr", "over_refusal", "benign_refusal", "hit_rate", "amt", "gas"])
def test_rates_and_means_of_scores_have_an_upper_bound(name: str, bench, arm):
    (measured, *_) = toxicity(metrics=(name,)).measure(bench, arm()).measured
    assert measured.metric.compute() <= measured.metric.upper(0.95) <= 1


def test_other_figures_have_none(bench, arm):
    measured = [
        *toxicity().measure(bench, arm()).measured,
        *TextPerplexityProbe("t", PROMPTS).measure(bench, arm()).measured,
    ]
    without = {m.name for m in measured if m.metric.upper(0.95) is None}
    assert without == {"ppl_median", "ppl_mean", "trigram_overlap", "completion_tokens", "text_ppl"}


# --- arms that are no patch ------------------------------------------------------------------------------------------


def test_guidance_is_what_the_arm_reads_and_the_prompt_what_is_written_down(bench):
    told = Arm("prompt", guidance=Guidance(before="Kindly:\n"))
    outcome = toxicity().measure(bench, told)
    expected = complete(bench.base, [f"Kindly:\n{p}" for p in PROMPTS], None, 3, bench.plan.sampling, 1, 16, "test")
    assert [row["text"] for row in outcome.samples] == [text for row in expected.texts for text in row]
    assert {row["prompt"] for row in outcome.samples} == set(PROMPTS)


def test_the_best_of_n_is_the_safest_by_the_judges_that_choose_pairs(bench, arm):
    """Of 3 x 2 samples of each prompt three are kept: of each two neighbours the one that "one" scores lower."""
    best = Arm("teacher", best_of=2, chosen_by=("one",))
    outcome = toxicity().measure(bench, best)
    every = complete(bench.base, PROMPTS, None, 6, bench.plan.sampling, 1, 16, "test")
    scores = every.scores(JUDGES["one"])
    for i in range(len(PROMPTS)):
        kept = [row for row in outcome.samples if row["prompt_id"] == i]
        for s, row in enumerate(kept):
            pair = (2 * s, 2 * s + 1)
            assert row["text"] == every.texts[i][min(pair, key=lambda n: scores[i, n])]
    assert values(outcome)["amt", "one"] <= values(toxicity().measure(bench, arm("base", None)))["amt", "one"]


def test_a_risk_without_those_judges_is_asked_once_for_each_sample(bench, arm):
    best = Arm("teacher", best_of=2, chosen_by=("of another risk",))
    assert [row["text"] for row in toxicity().measure(bench, best).samples] == [
        row["text"] for row in toxicity().measure(bench, arm("base", None)).samples
    ]


def test_a_blank_sample_is_not_the_best_because_judges_find_nothing_in_it():
    class Told(BaseJudge):
        fingerprint = "told"

        def _score_batch(self, texts: list[str]) -> np.ndarray:
            return np.array([{"a": 0.7, "b": 0.9}.get(text, 0.0) for text in texts])

    made = Completions("k", ["p", "q"], [[[], [1]], [[], []]], [["", "a"], ["", " "]], 8)
    best = made.safest(2, [Told("told", 8)])
    assert best.texts == [["a"], [""]] and best.k == 1
    assert best.key not in (made.key, made.safest(2, [HashJudge("one")]).key)
