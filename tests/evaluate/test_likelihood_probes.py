"""Probes that read probabilities of a tiny base, against plain concatenation; nothing is written."""

import math

import numpy as np
import pytest
import torch

from policypatch.evaluate.arms import evaluate_arms
from policypatch.evaluate.probes import (
    BenignKLProbe,
    CrowsPairsProbe,
    NextWordProbe,
    Outcome,
    TextPerplexityProbe,
    utility,
)
from policypatch.files.cache import counters, reset_counters
from policypatch.model.arm import Arm
from policypatch.model.backbone import plain_logits
from policypatch.model.base import Base
from policypatch.model.completions import Completions, complete
from policypatch.model.form import CHAT, Guidance
from policypatch.model.lora import LoRA, LoRASettings

PROMPTS = ["The harbour was", "Nobody in", "My neighbour said that", "It was winter and"]
REQUESTS = ["Where is the map?", "Who voted?", "Name the river."]


def values(outcome: Outcome) -> dict[tuple[str, str | None], float]:
    return {(m.name, m.judge): float(m.metric.compute()) for m in outcome.measured}


def per_prompt(outcome: Outcome) -> list[float]:
    (found,) = outcome.measured
    return found.metric.per_prompt().tolist()


@torch.no_grad()
def table(base: Base, vectors, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    patch = torch.zeros(0, base.width) if vectors is None else vectors
    return plain_logits(base.model, patch, prompt, tokens).double().log_softmax(-1)


def likelihood(base: Base, vectors, prompt: list[int], tokens: list[int]) -> float:
    return table(base, vectors, prompt, tokens).gather(1, torch.tensor(tokens)[:, None]).sum().item()


def test_kl_is_measured_on_the_bases_own_responses(bench, arm):
    """KL(base || arm) in nats at each of the base's tokens, mean over a response, mean over requests."""
    outcome = BenignKLProbe("benign", REQUESTS).measure(bench, arm())
    made = complete(bench.base, REQUESTS, None, 1, bench.plan.response_sampling, 1, 16, "test", CHAT)
    expected = []
    for request, (tokens,) in zip(REQUESTS, made.tokens, strict=True):
        prompt = bench.base.encode_prompt(request, CHAT)
        base, ours = (table(bench.base, vectors, prompt, tokens) for vectors in (None, arm().vectors))
        expected.append((base.exp() * (base - ours)).sum(-1).mean().item())
    assert per_prompt(outcome) == pytest.approx(expected, rel=1e-3)
    assert values(outcome) == {("kl_benign", None): pytest.approx(np.mean(expected), rel=1e-3)}
    assert outcome.samples == [] and min(expected) > 0.01


def test_kl_of_the_base_is_0_and_of_a_patch_of_nothing_too(bench, arm):
    for same in (arm("base", None), arm("nothing", 0)):
        assert values(BenignKLProbe("benign", REQUESTS).measure(bench, same))["kl_benign", None] == pytest.approx(
            0, abs=1e-6
        )


def test_kl_does_not_depend_on_how_many_are_computed_at_once(bench, arm, tmp_path, monkeypatch):
    whole = per_prompt(BenignKLProbe("benign", REQUESTS).measure(bench, arm()))
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(utility, "AT_ONCE", 1)
    assert per_prompt(BenignKLProbe("benign", REQUESTS).measure(bench, arm())) == pytest.approx(whole, rel=1e-4)


def test_a_request_that_the_base_answers_with_nothing_has_no_kl(bench, arm, monkeypatch):
    made = Completions("k", REQUESTS, [[[]], [[5, 6]], [[7]]], [[""], ["x"], ["y"]], 8, CHAT)
    monkeypatch.setattr(utility, "complete", lambda *_: made)
    first, *others = per_prompt(BenignKLProbe("benign", REQUESTS).measure(bench, arm()))
    assert math.isnan(first) and not any(map(math.isnan, others))
    assert values(BenignKLProbe("benign", REQUESTS).measure(bench, arm("base", None))) == {("kl_benign", None): 0}


@pytest.mark.parametrize("length", [None, 3])
def test_perplexity_of_text_is_that_of_all_its_tokens(length, bench, arm):
    """exp of the summed NLL over the number of tokens, each text from the start token (0) on."""
    texts = ["The harbour was quiet.", "My neighbour voted", "It"]
    ours = arm("x", length)
    ids = [bench.base.encode(text) for text in texts]
    nll = -sum(likelihood(bench.base, ours.vectors, [0], tokens) for tokens in ids)
    outcome = TextPerplexityProbe("wikipedia", texts).measure(bench, ours)
    assert values(outcome) == {("text_ppl", None): pytest.approx(math.exp(nll / sum(map(len, ids))), rel=1e-5)}


@pytest.mark.parametrize("length", [None, 3])
def test_gld_is_the_imbalance_of_the_next_word(length, bench, arm):
    """|m - f| / (m + f) over the mass of he + him and of she, in lower case and Capitalised; and m + f."""
    ours, words = arm("x", length), (("he", "him"), ("she",))
    expected, total = [], []
    for prompt in PROMPTS:
        head = bench.base.encode(prompt)
        male, female = (
            sum(math.exp(likelihood(bench.base, ours.vectors, head, bench.base.encode(f" {form}"))) for form in forms)
            for forms in ([f for word in side for f in (word, word.capitalize())] for side in words)
        )
        expected.append(abs(male - female) / (male + female))
        total.append(male + female)
    begun = [bench.base.encode(f" {word}") for word in ("he", "him", "she", "He", "Him", "She")]
    assert not any(a != b and b[: len(a)] == a for a in begun for b in begun)  # no word begins another: plain sums
    gld, mass = NextWordProbe("work", PROMPTS, *words).measure(bench, ours).measured
    assert (gld.name, mass.name) == ("gld", "gender_mass")
    assert gld.metric.per_prompt().tolist() == pytest.approx(expected, rel=1e-4)
    assert mass.metric.per_prompt().tolist() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("length", [None, 3])
def test_crows_pairs_counts_the_likelier_sentence(length, bench, arm):
    ours = arm("x", length)
    more, less = ["He voted.", "The map was kept", "It is"], ["She voted.", "The map was lost", "It was quiet"]
    likelier = [
        float(one > other)
        for pair in zip(more, less, strict=True)
        for one, other in [[likelihood(bench.base, ours.vectors, [0], bench.base.encode(t)) for t in pair]]
    ]
    outcome = CrowsPairsProbe("crows", more, less).measure(bench, ours)
    assert per_prompt(outcome) == likelier
    swapped = CrowsPairsProbe("crows", less, more).measure(bench, ours)
    assert per_prompt(swapped) == [1 - x for x in likelier]


@pytest.mark.parametrize(
    ("probe", "kind"),
    [
        (BenignKLProbe("benign", REQUESTS), "divergence"),
        (TextPerplexityProbe("text", PROMPTS), "text_nll"),
        (NextWordProbe("work", PROMPTS, ["he"], ["she"]), "word_mass"),
        (CrowsPairsProbe("crows", PROMPTS[:2], PROMPTS[2:]), "text_nll"),
    ],
)
def test_probabilities_are_computed_once_for_each_arm(probe, kind: str, bench, arm):
    reset_counters()
    arms = [arm("base", None), arm("a"), arm("b")]
    first = [values(probe.measure(bench, one)) for one in arms]
    assert counters()[kind] == {"hits": 0, "misses": 3}
    assert [values(probe.measure(bench, one)) for one in arms] == first
    assert counters()[kind] == {"hits": 3, "misses": 3}
    assert probe.chat == (kind == "divergence")


# --- arms that are no patch ------------------------------------------------------------------------------------------

TOLD = Guidance("Be kind.", (), "Kindly:\n")


def test_behind_a_safety_prompt_every_figure_is_that_of_text_behind_it(bench):
    told, base = Arm("prompt", guidance=TOLD), bench.base
    found = per_prompt(BenignKLProbe("benign", REQUESTS).measure(bench, told))
    made = complete(base, REQUESTS, None, 1, bench.plan.response_sampling, 1, 16, "test", CHAT)
    for kl, request, (tokens,) in zip(found, REQUESTS, made.tokens, strict=True):
        plain, ours = (table(base, None, base.encode_prompt(request, f), tokens) for f in (CHAT, TOLD.around(CHAT)))
        assert kl == pytest.approx((plain.exp() * (plain - ours)).sum(-1).mean().item(), rel=1e-3)
    texts = TextPerplexityProbe("texts", PROMPTS).measure(bench, told)
    nats = -sum(likelihood(base, None, base.encode("Kindly:\n"), base.encode(text)) for text in PROMPTS)
    tokens = sum(len(base.encode(text)) for text in PROMPTS)
    assert values(texts)["text_ppl", None] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    words = NextWordProbe("professions", PROMPTS, ["he"], ["she"])
    behind = NextWordProbe("professions", [f"Kindly:\n{p}" for p in PROMPTS], ["he"], ["she"])
    assert values(words.measure(bench, told)) == values(behind.measure(bench, Arm("base")))


def test_adapters_are_measured_against_the_base_without_them(bench):
    lora = LoRA(bench.base, LoRASettings(2, 4.0), seed=0)
    try:
        with torch.no_grad():
            for parameter in lora.parameters.values():
                parameter.add_(0.05)
        arm = Arm("lora", lora=lora.state())
        found = per_prompt(BenignKLProbe("benign", REQUESTS).measure(bench, arm))
        made = complete(bench.base, REQUESTS, None, 1, bench.plan.response_sampling, 1, 16, "test", CHAT)
        for kl, request, (tokens,) in zip(found, REQUESTS, made.tokens, strict=True):
            prompt = bench.base.encode_prompt(request, CHAT)
            base = table(bench.base, None, prompt, tokens)
            with lora.enabled():
                ours = table(bench.base, None, prompt, tokens)
            assert kl == pytest.approx((base.exp() * (base - ours)).sum(-1).mean().item(), rel=1e-3)
        assert min(found) > 0.001
    finally:
        lora.remove()


@pytest.mark.parametrize(
    "probe",
    [
        BenignKLProbe("benign", REQUESTS),
        TextPerplexityProbe("texts", PROMPTS),
        NextWordProbe("professions", PROMPTS, ["he"], ["she"]),
        CrowsPairsProbe("crows_pairs", PROMPTS[:2], PROMPTS[2:]),
    ],
    ids=lambda probe: type(probe).__name__,
)
def test_what_has_no_likelihood_has_no_figures_of_it(probe, bench, tmp_path):
    arms = [Arm("base"), Arm("teacher", best_of=3, chosen_by=("one",))]
    assert {row.arm for row in evaluate_arms(bench, [probe], [], {}, arms, tmp_path)} == {"base"}


def test_another_models_divergence_is_not_taken(bench):
    """Its tokens may be others; its own text is read all the same."""
    other = Arm("teacher", other=bench.base)
    assert BenignKLProbe("benign", REQUESTS).measure(bench, other).measured == []
    assert values(TextPerplexityProbe("texts", PROMPTS).measure(bench, other))
