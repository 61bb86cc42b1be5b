"""Likelihoods of texts and next words, held against plain concatenation, with a patch and without."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from policypatch.errors import PolicyPatchError
from policypatch.evaluate import likelihoods
from policypatch.evaluate.likelihoods import next_word_mass, sequence_nll
from policypatch.evaluate.metrics import GLD
from policypatch.model.backbone import plain_logits
from policypatch.model.base import Base
from policypatch.model.load import load_base

TEXTS = ["The harbour was quiet.", "", "Nobody in the office could say where.", "It"]
PROMPTS = ["My neighbour said that", "The train", "When the committee voted, the"]
WORDS = ["he", "she", "her", "hers", "committee", "harbour", "Mrs."]


@pytest.fixture(params=[0, 3])
def vectors(request: pytest.FixtureRequest, tiny_base: Base) -> torch.Tensor | None:
    if not request.param:
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randn(request.param, tiny_base.width, generator=generator) * tiny_base.embedding.std()


@torch.no_grad()
def plain(base: Base, vectors: torch.Tensor | None, head: list[int], tail: list[int]) -> torch.Tensor:
    """(T,) log-probability of each token of the tail."""
    patch = torch.zeros(0, base.width) if vectors is None else vectors
    logits = plain_logits(base.model, patch, head, tail).double()
    return logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None])[:, 0]


def test_a_text_is_scored_from_its_first_token_on(tiny_base: Base, vectors):
    """The tokenizer puts nothing before a text, so the start token (BOS, 0) stands there."""
    assert tiny_base.encode_prompt("") == []
    found = sequence_nll(tiny_base, vectors, TEXTS)
    assert found.dtype == np.float64
    for text, (nll, tokens) in zip(TEXTS, found, strict=True):
        ids = tiny_base.encode(text)
        assert tokens == len(ids)
        assert nll == (pytest.approx(-plain(tiny_base, vectors, [0], ids).sum().item(), rel=1e-5) if ids else 0)


def test_a_text_after_a_prompt(tiny_base: Base, vectors):
    texts = [" the map was old.", " arrived", ""]
    found = sequence_nll(tiny_base, vectors, texts, PROMPTS)
    for prompt, text, (nll, _) in zip(PROMPTS[:2], texts[:2], found, strict=False):
        ids = tiny_base.encode(text)
        expected = -plain(tiny_base, vectors, tiny_base.encode(prompt), ids).sum().item()
        assert nll == pytest.approx(expected, rel=1e-5)
    assert found[2].tolist() == [0, 0]


def test_how_texts_are_batched_does_not_matter(tiny_base: Base, vectors, monkeypatch: pytest.MonkeyPatch):
    whole = sequence_nll(tiny_base, vectors, TEXTS)
    monkeypatch.setattr(likelihoods, "BATCH_TOKENS", 8)
    np.testing.assert_allclose(sequence_nll(tiny_base, vectors, TEXTS), whole, rtol=1e-5)
    assert sequence_nll(tiny_base, vectors, []).shape == (0, 2)


def expected_mass(base: Base, vectors, prompt: str, words: list[str]) -> list[float]:
    """Each word from scratch: sum of both spellings' products, less what is spent on a longer listed spelling."""
    head, spelled = base.encode(prompt), {}
    for word in words:
        for form in (word.lower(), word.capitalize()):
            spelled[tuple(base.encode(f" {form}"))] = word
    mass = {tokens: plain(base, vectors, head, list(tokens)).sum().exp().item() for tokens in spelled}
    own = dict(mass)
    for tokens in spelled:
        begun = [s for s in spelled if len(s) < len(tokens) and tokens[: len(s)] == s]
        if begun:
            own[max(begun, key=len)] -= mass[tokens]
    return [sum(own[tokens] for tokens in spelled if spelled[tokens] == word) for word in words]


def test_mass_of_words_is_that_of_their_tokens(tiny_base: Base, vectors):
    assert len(tiny_base.encode(" hers")) > 1 == len(tiny_base.encode(" the"))
    found = next_word_mass(tiny_base, vectors, PROMPTS, WORDS)
    assert found.shape == (3, len(WORDS))
    for prompt, row in zip(PROMPTS, found, strict=True):
        np.testing.assert_allclose(row, expected_mass(tiny_base, vectors, prompt, WORDS), rtol=1e-4, atol=1e-12)


def test_a_word_that_begins_like_another_is_not_counted_for_it(tiny_base: Base):
    """`her` stands in `hers`, token by token: with both listed, their sum is what `her` has alone."""
    assert tiny_base.encode(" hers")[: len(tiny_base.encode(" her"))] == tiny_base.encode(" her")
    both = next_word_mass(tiny_base, None, PROMPTS, ["her", "hers"])
    alone = next_word_mass(tiny_base, None, PROMPTS, ["her"])
    np.testing.assert_allclose(both.sum(1), alone[:, 0], rtol=1e-6)
    assert (both > 0).all()


def test_every_next_word_together_has_mass_one(tiny_base: Base, monkeypatch: pytest.MonkeyPatch):
    """One word for each token of the vocabulary, whatever it says: the probabilities of a distribution."""
    words = [str(i) for i in range(300)]
    monkeypatch.setattr(likelihoods, "_spellings", lambda base, word: [(int(word),)])
    np.testing.assert_allclose(next_word_mass(tiny_base, None, PROMPTS, words).sum(1), 1, rtol=1e-5)


def test_white_space_at_the_end_of_a_prompt_is_the_words(tiny_base: Base):
    found = next_word_mass(tiny_base, None, ["The train ", "The train"], ["he"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_no_words_and_no_prompts(tiny_base: Base):
    assert next_word_mass(tiny_base, None, [], ["he"]).shape == (0, 1)


def test_what_is_refused(tiny_base: Base):
    with pytest.raises(PolicyPatchError, match="'he' twice"):
        next_word_mass(tiny_base, None, PROMPTS, ["he", "He"])
    with pytest.raises(PolicyPatchError, match="empty one"):
        next_word_mass(tiny_base, None, PROMPTS, ["he", " "])
    with pytest.raises(PolicyPatchError, match="no words"):
        next_word_mass(tiny_base, None, PROMPTS, [])
    with pytest.raises(PolicyPatchError, match="1 prompts do not fit 2 texts"):
        sequence_nll(tiny_base, None, ["a", "b"], ["a"])
    with pytest.raises(PolicyPatchError, match=r"text 2 has .* more than the 512 that tiny reads"):
        sequence_nll(tiny_base, None, ["a", "x y " * 600])


@pytest.mark.slow
def test_the_default_base_knows_a_likely_text_and_a_stereotype():
    """Real text is likelier than its words shuffled, and `he` and `she` are words that come next."""
    conf = Path(__file__).parents[2] / "conf" / "model" / "smollm2_135m.yaml"
    base = load_base(OmegaConf.merge(OmegaConf.load(conf), {"dtype": "float32", "device": "cpu"}))
    text = "The committee asked for a second opinion before it voted on the new bridge."
    (good, tokens), (bad, _) = sequence_nll(base, None, [text, " ".join(sorted(text.split()))])
    assert tokens < good < 7 * tokens  # nats
    assert good + 20 < bad
    prompts = ["After work, the plumber told the neighbours that", "When the nurse came home,"]
    mass = next_word_mass(base, None, prompts, ["he", "she", "himself", "herself", "grandson"])
    assert (mass[:, :2] > 0.01).all() and mass.sum() < 2
    gld = GLD()
    gld.update(torch.from_numpy(mass[:, :2]))
    (plumber, nurse) = (mass[:, 0] / mass[:, :2].sum(1)).tolist()
    assert plumber > nurse and not math.isnan(gld.compute().item())
