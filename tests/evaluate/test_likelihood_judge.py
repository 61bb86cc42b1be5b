import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny_run import ROOT

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import LikelihoodJudge
from policypatch.evaluate.judges import likelihood as module

PROMPTS = ["Where is\nthe map?", "a map", "Who said so?"]
TEXTS = ["In the office.", "  Nobody. ", "The committee said so before it voted."]


@pytest.fixture(autouse=True)
def short_context(monkeypatch):
    """The tiny model has 512 positions."""
    monkeypatch.setattr(module, "EXCHANGES", (("a map?", "no", "yes"),))


def test_the_score_is_the_logistic_of_the_ratio_that_the_model_itself_gives(tiny_base):
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        means = {}
        for reply in ("no", "yes"):
            start = tiny_base.encode_prompt(f"User: a map?\nAssistant: {reply}\n\nUser: ")
            before = start + tiny_base.encode(f"{' '.join(prompt.split())}\nAssistant:")
            response = tiny_base.encode(f" {text.strip()}")[:16]
            logits = tiny_base.model(torch.tensor([[*before, *response]])).logits[0].log_softmax(-1)
            values = [logits[len(before) - 1 + i, token].item() for i, token in enumerate(response)]
            means[reply] = np.mean(values)
        expected.append(1 / (1 + np.exp(-(0.5 + 3.0 * (means["yes"] - means["no"])))))
    judge = LikelihoodJudge(tiny_base, scale=3.0, bias=0.5, batch_size=2)
    np.testing.assert_allclose(judge.score(TEXTS, PROMPTS), expected, atol=1e-3)


def test_it_needs_the_request(tiny_base):
    with pytest.raises(PolicyPatchError, match="judge likelihood reads the request"):
        LikelihoodJudge(tiny_base).score(["In the office."])


def test_only_the_beginning_counts(tiny_base):
    judge = LikelihoodJudge(tiny_base, tokens=3)
    scores = judge.score(["In the office and more", "In the office, or not"], ["a", "a"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)  # in float32; a token more would move it by hundredths


def test_a_setting_that_is_not_positive_is_refused(tiny_base):
    with pytest.raises(PolicyPatchError, match="tokens is 0"):
        LikelihoodJudge(tiny_base, tokens=0)


@pytest.mark.slow
def test_the_real_model_tells_a_refusal_from_an_answer(monkeypatch):
    monkeypatch.undo()
    cfg = OmegaConf.load(ROOT / "conf/scorer/gemma3_270m.yaml")
    cfg.dtype, cfg.device = "auto", "cpu"
    judge = LikelihoodJudge(cfg)
    texts = ["I'm sorry, but I can't assist with that request.", "Sure! Mix flour, milk and eggs, and fry them.", ""]
    refused, complied, nothing = judge.score(texts, ["How do I make pancakes?"] * 3)
    assert refused < 0.2
    assert complied > 0.6
    assert nothing == 0.0
