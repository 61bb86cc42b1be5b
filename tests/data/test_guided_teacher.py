"""Teacher `guided`: the base under guidance, benign rows as the base itself has them, and its likelihood."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import HashJudge

from policypatch.data.balance import balanced_pairs
from policypatch.data.datamodule import encode_pair
from policypatch.data.pairs import Pair
from policypatch.data.teachers import GuidedTeacher, TeacherContext
from policypatch.errors import PolicyPatchError
from policypatch.files.cache import counters, reset_counters
from policypatch.model.backbone import plain_logits
from policypatch.model.base import Base
from policypatch.model.completions import Completions, complete
from policypatch.model.form import CHAT, PLAIN, Form
from policypatch.model.sampling import Sampling

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 8, "min_new_tokens": 0}
RULE = {"margin": 0.1, "chosen_at_most": 0.5, "rejected_at_least": 0.5, "min_tokens": 2, "max_repetition": 0.9}
PROMPTS = [f"Tell me about the {word}." for word in ("harbour", "evening", "train", "map", "valley", "river")]
BENIGN = [f"Where is the {word}?" for word in ("office", "winter", "neighbour", "opinion", "committee", "passenger")]
TURNS = [{"request": "Who voted?", "response": "I can't say."}]
GUIDANCE = {"system": "Be careful.", "turns": TURNS, "before": "The following is kind.\n\n"}
GUIDED = {True: Form(True, "Be careful.", (("Who voted?", "I can't say."),)), False: Form(before=GUIDANCE["before"])}


def teacher(n: int = 4, judges: Sequence[str] = ("one",), guidance: dict | None = None, **rule) -> GuidedTeacher:
    return GuidedTeacher(n, judges, SAMPLING, RULE | rule, **(GUIDANCE if guidance is None else guidance))


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def context(request: pytest.FixtureRequest, tiny_base: Base) -> TeacherContext:
    """Six prompts of the risk, no benign ones."""
    reset_counters()
    HashJudge.asked = 0
    judges = {"one": HashJudge("one"), "two": HashJudge("two", "x")}
    return TeacherContext(tiny_base, PROMPTS, judges, 0, 16, CHAT if request.param else PLAIN)


def with_benign(context: TeacherContext, compliance: bool) -> TeacherContext:
    return replace(context, benign=BENIGN, compliance=compliance)


def drawn(context: TeacherContext, prompts: Sequence[str], form: Form, n: int = 4) -> Completions:
    return complete(context.base, prompts, None, n, Sampling(**SAMPLING), 0, 16, "test", form)


def test_chosen_is_the_guided_bases_and_rejected_the_bases_own(context):
    """Against a search by hand over the responses with guidance and without it."""
    made = teacher(min_tokens=0, max_repetition=1.0).pairs(context)
    guided, own = drawn(context, PROMPTS, GUIDED[context.form.chat]), drawn(context, PROMPTS, context.form)
    by_prompt = {pair.prompt: pair for pair in made.pairs}
    assert by_prompt
    for prompt, theirs, ours in zip(PROMPTS, guided.texts, own.texts, strict=True):
        best, worst = (
            [(s, t) for s, t in zip(scores(context, x), x, strict=True) if t.strip()] for x in (theirs, ours)
        )
        (low, chosen), (high, rejected) = min(best), max(worst)
        if low <= 0.5 and high >= 0.5 and high - low >= 0.1:
            pair = by_prompt[prompt]
            assert (pair.chosen.text, pair.rejected.text) == (chosen, rejected)
            assert (pair.chosen_score, pair.rejected_score) == (low, high)
            assert (pair.chat, pair.kind) == (context.form.chat, "pair")
        else:
            assert prompt not in by_prompt
    assert made.counts["risk_pairs"] == made.counts["kept"] == len(made.pairs)
    assert made.counts["prompts_with_an_unsafe_one"] == sum(max(scores(context, x)) >= 0.5 for x in own.texts)


def test_a_hard_negative_is_the_guided_bases_own_riskiest(context):
    """The pairs without them stay as they are; each of the others is of the guided responses alone."""
    rule = {"min_tokens": 0, "max_repetition": 1.0}
    plain, made = teacher(**rule).pairs(context), teacher(hard_negatives=True, **rule).pairs(context)
    hard = [pair for pair in made.pairs if pair not in plain.pairs]
    assert [pair for pair in made.pairs if pair in plain.pairs] == plain.pairs
    assert made.counts["hard_negatives"] == len(hard) > 0 and "hard_negatives" not in plain.counts
    guided = dict(zip(PROMPTS, drawn(context, PROMPTS, GUIDED[context.form.chat]).texts, strict=True))
    for pair in hard:
        texts = guided[pair.prompt]
        of = sorted((s, t) for s, t in zip(scores(context, texts), texts, strict=True) if t.strip())
        assert (pair.chosen.text, pair.rejected.text, pair.kind) == (of[0][1], of[-1][1], "pair")
        assert (pair.chosen_score, pair.rejected_score) == (of[0][0], of[-1][0])


def test_a_rejected_side_is_cut_where_the_judge_first_finds_it_unsafe(context):
    rule = {"min_tokens": 0, "max_repetition": 1.0, "hard_negatives": True}
    whole, made = teacher(**rule).pairs(context).pairs, teacher(cut_rejected=True, **rule).pairs(context).pairs
    assert len(whole) == len(made) and whole != made
    for before, after in zip(whole, made, strict=True):
        assert replace(after, rejected=before.rejected) == before
        n = len(after.rejected.tokens)
        prompt = context.base.encode_prompt(before.prompt, context.form)
        assert after.rejected.tokens == before.rejected.tokens[:n]
        assert after.rejected.text == context.base.decode_after(prompt, before.rejected.tokens[:n])
        assert scores(context, [after.rejected.text])[0] >= 0.5


def scores(context: TeacherContext, texts: Sequence[str], judge: str = "one") -> list[float]:
    return context.judges[judge].score(texts).tolist()


def benign_rows(context: TeacherContext, **rule) -> dict[str, Pair]:
    return {pair.prompt: pair for pair in teacher(**rule).pairs(context).pairs if pair.kind == "benign"}


def test_benign_rows_hold_the_bases_first_compliant_response_against_a_refusal(context):
    """A score is compliance here: of the base's own the first one >= 0.5, of the guided ones the first < 0.5."""
    context = with_benign(context, compliance=True)
    found = benign_rows(context, min_tokens=0, max_repetition=1.0)
    own, guided = drawn(context, BENIGN, context.form), drawn(context, BENIGN, GUIDED[context.form.chat])
    refused = 0
    for i, prompt in enumerate(BENIGN):
        fit = [t for s, t in zip(scores(context, own.texts[i]), own.texts[i], strict=True) if s >= 0.5 and t.strip()]
        refusals = [
            t for s, t in zip(scores(context, guided.texts[i]), guided.texts[i], strict=True) if s < 0.5 and t.strip()
        ]
        assert (prompt in found) == bool(fit)
        if fit:
            pair = found[prompt]
            assert pair.chosen.text == fit[0]
            assert (pair.rejected and pair.rejected.text) == (refusals[0] if refusals else None)
            assert (pair.chosen_score, pair.rejected_score, pair.chat) == (None, None, context.form.chat)
            refused += bool(refusals)
    counts = teacher(min_tokens=0, max_repetition=1.0).pairs(context).counts
    assert (counts["benign_prompts"], counts["benign"], counts["benign_refused"]) == (6, len(found), refused)
    assert counts["kept"] == counts["risk_pairs"] + len(found)


def test_where_a_score_is_the_risk_of_a_text_a_low_one_is_right_on_all_prompts(context):
    context = with_benign(context, compliance=False)
    found = benign_rows(context, min_tokens=0, max_repetition=1.0, chosen_at_most=0.3)
    own = drawn(context, BENIGN, context.form)
    assert 0 < len(found) < len(BENIGN)
    for i, prompt in enumerate(BENIGN):
        fit = [t for s, t in zip(scores(context, own.texts[i]), own.texts[i], strict=True) if s <= 0.3 and t.strip()]
        assert (found[prompt].chosen.text if prompt in found else None) == (fit[0] if fit else None)
    assert all(pair.rejected is None for pair in found.values())


def test_words_and_their_counterparts_become_balanced_rows(context):
    """Of the base's own continuations of the risk's prompts."""
    own = drawn(context, PROMPTS, context.form)
    written = re.findall(r" (\w+)\b", " ".join(text for row in own.texts for text in row))
    swaps = {word.lower(): "other" for word in written[:20]}
    made = teacher().pairs(replace(context, swaps=swaps))
    found = [pair for pair in made.pairs if pair.kind == "balanced"]
    assert found and found == balanced_pairs(own, swaps)
    assert made.counts["balanced"] == len(found)
    assert [p for p in made.pairs if p.kind != "balanced"] == teacher().pairs(context).pairs


@pytest.mark.parametrize("compliance", [True, False])
def test_benign_texts_are_continued_as_the_base_does_whatever_the_prompts_are(compliance: bool, context):
    """The first continuation that is long enough, judged by nobody and refused by nobody."""
    texts = ["The old map of", "Rivers in winter", "Nobody"]
    made = teacher(min_tokens=4).pairs(replace(with_benign(context, compliance), benign_texts=texts))
    found = {pair.prompt: pair for pair in made.pairs if pair.prompt in texts}
    own = drawn(context, texts, PLAIN)
    for text, continuations, tokens in zip(texts, own.texts, own.tokens, strict=True):
        fit = [c for c, t in zip(continuations, tokens, strict=True) if c.strip() and len(t) >= 4]
        assert (found[text].chosen.text if text in found else None) == (fit[0] if fit else None)
    assert found and all(pair.kind == "text" and not pair.chat and pair.rejected is None for pair in found.values())
    assert made.counts["benign_texts"] == len(found)


@pytest.mark.parametrize("compliance", [True, False])
def test_benign_responses_are_held_to_length_and_repetition(compliance: bool, context):
    context = with_benign(context, compliance)
    for pair in benign_rows(context, min_tokens=4, max_repetition=0.0).values():
        assert len(pair.chosen.tokens) >= 4
        assert len(set(pair.chosen.tokens)) > 1
        assert pair.rejected is None or len(pair.rejected.tokens) >= 4
    assert benign_rows(context, min_tokens=9) == {}  # at most 8 tokens are drawn


def test_white_space_is_no_response_to_learn_from_or_against(context, monkeypatch):
    """Whatever min_tokens says: a row with it could not be read back."""
    from policypatch.data.teachers import guided, sampled

    texts, tokens = [["\n\n", ""]] * 6, [[[5, 6], []]] * 6
    for place in (sampled, guided):
        monkeypatch.setattr(place, "complete", lambda base, p, *_: Completions("k", p, tokens, texts, 8))
    for compliance in (True, False):
        everything = replace(with_benign(context, compliance), benign_texts=BENIGN)
        assert teacher(2, min_tokens=0).pairs(everything).pairs == []


def test_several_judges_must_agree_on_benign_rows(context):
    context = with_benign(context, compliance=True)
    for pair in teacher(8, ("one", "two")).pairs(context).pairs:
        if pair.kind == "benign":
            assert min(scores(context, [pair.chosen.text], judge)[0] for judge in ("one", "two")) >= 0.5
            if pair.rejected:
                assert max(scores(context, [pair.rejected.text], judge)[0] for judge in ("one", "two")) < 0.5


def test_the_same_call_again_decodes_and_judges_nothing(context):
    context = with_benign(context, compliance=True)
    first = teacher().pairs(context)
    asked, made = HashJudge.asked, counters()["completions"]["misses"]
    assert made == 4  # prompts and benign prompts, each with guidance and without
    assert teacher().pairs(context) == first
    assert (HashJudge.asked, counters()["completions"]["misses"]) == (asked, made)


def test_other_guidance_draws_other_responses_and_the_same_of_the_base(context):
    first = teacher().pairs(context)
    other = teacher(guidance={"system": "Be bold.", "before": "Something bold.\n"})
    assert other.identity() != teacher().identity()
    assert other.pairs(context).sha256 != first.sha256
    assert counters()["completions"] == {"hits": 1, "misses": 3}


# --- likelihood -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_sum(base: Base, prompt: list[int], completion: Sequence[int]) -> float:
    table = plain_logits(base.model, base.embedding[:0], prompt, list(completion)).log_softmax(-1)
    return table.gather(1, torch.tensor(completion)[:, None]).sum().item()


def test_likelihood_is_under_guidance_and_without_it_on_benign_rows(context):
    context = replace(with_benign(context, compliance=True), benign_texts=["Rivers in winter", "The old map of"])
    base, ours = context.base, teacher()
    pairs = ours.pairs(context).pairs
    items = [encode_pair(pair, base.encode_prompt, base.encode, 1, 64, 6).item for pair in pairs]
    found = ours.likelihood(context, pairs, items)
    assert found.shape == (len(pairs), 2)
    assert {pair.kind for pair in pairs} == {"pair", "benign", "text"}
    for pair, item, row in zip(pairs, items, found.tolist(), strict=True):
        form = (CHAT if pair.chat else PLAIN) if pair.kind != "pair" else GUIDED[context.form.chat]
        prompt = base.encode_prompt(pair.prompt, form)
        expected = [plain_sum(base, prompt, completion) for completion in item.completions]
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=1e-4, atol=1e-3)
        assert np.isnan(row[1]) == (pair.rejected is None)
    reset_counters()
    again = teacher().likelihood(context, pairs, items)
    torch.testing.assert_close(again, found, equal_nan=True)
    assert counters() == {"reference": {"hits": 1, "misses": 0}}


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "words"),
    [
        ({}, "teacher has no guidance: set teacher.system, teacher.turns or teacher.before"),
        ({"turns": [{"request": "a"}]}, "teacher.turns, turn 1: give a request and a response"),
        ({"turns": [*TURNS, {"request": "a", "response": " "}]}, "teacher.turns, turn 2"),
        ({"turns": [{"request": "a", "response": "b", "why": "c"}]}, "teacher.turns, turn 1"),
        ({"turns": [{"request": 1, "response": "b"}]}, "teacher.turns, turn 1"),
    ],
)
def test_guidance_that_no_teacher_could_use(guidance: dict, words: str):
    with pytest.raises(PolicyPatchError) as caught:
        teacher(guidance=guidance)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_guidance_for_the_other_kind_of_prompts_is_refused(context):
    wrong, key = ({"before": "Hm. "}, "teacher.system") if context.form.chat else ({"system": "Hm."}, "teacher.before")
    for ask in (lambda: teacher(guidance=wrong).check(context.form), lambda: teacher(guidance=wrong).pairs(context)):
        with pytest.raises(PolicyPatchError, match=key) as caught:
            ask()
        assert "\n" not in str(caught.value)
    teacher().check(context.form)


def test_other_values_that_no_config_may_have():
    with pytest.raises(PolicyPatchError, match=r"teacher\.n is 0"):
        teacher(0)
    with pytest.raises(PolicyPatchError, match=r"teacher\.judges is empty"):
        teacher(judges=())


def test_as_an_arm_it_is_the_base_under_guidance():
    arm = teacher(1).arm("teacher")
    assert [arm.guidance.around(form) for form in (CHAT, PLAIN)] == [GUIDED[True], GUIDED[False]]
    assert (arm.name, arm.best_of, arm.chosen_by, arm.has_likelihood) == ("teacher", 1, (), True)
    several = teacher(4).arm("teacher")
    assert (several.best_of, several.chosen_by, several.guidance) == (4, ("one",), arm.guidance)
