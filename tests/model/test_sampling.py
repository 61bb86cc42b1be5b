"""Drawing a token: the distribution is the nucleus's own, whichever way a token was found."""

import pytest
import torch
from scipy.stats import chisquare

from policypatch.model.sampling import DRAWS, Sampling, _by_sorting, next_tokens, uniforms

# (probabilities, top_p, tokens of the nucleus). A token is in it when those more probable hold less than top_p.
NUCLEI = {
    # In order .35 .25 .15 .10 .10 .05: before them stand 0, .35, .60 (< .7, in), .75 (out).
    "three of six": ([0.10, 0.35, 0.05, 0.25, 0.10, 0.15], 0.7, [1, 3, 5]),
    # .4 alone holds less than .5, the three of .2 have .4 before them: all of these equals are in.
    "ties at the edge": ([0.2, 0.4, 0.2, 0.2], 0.5, [0, 1, 2, 3]),
    # .07 and .06 hold .13: eight draws all miss in 33 % of the rows, and sorting has to serve them.
    "a nucleus that draws rarely hit": ([0.07, 0.06] + [0.01] * 87, 0.1, [0, 1]),
    "one token": ([0.3, 0.6, 0.1], 0.5, [1]),
    "everything": ([0.10, 0.35, 0.05, 0.25, 0.10, 0.15], 1.0, [0, 1, 2, 3, 4, 5]),
}
ROWS = 40_000


def draws(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, DRAWS + 1, generator=torch.Generator().manual_seed(seed))


def is_distributed_as(tokens: torch.Tensor, probabilities: list[float], nucleus: list[int]) -> None:
    counts = torch.bincount(tokens, minlength=len(probabilities))
    assert counts.sum() == counts[nucleus].sum(), "a token outside the nucleus"
    weights = torch.tensor(probabilities, dtype=torch.float64)[nucleus]
    if len(nucleus) > 1:
        assert chisquare(counts[nucleus], (weights / weights.sum() * len(tokens))).pvalue > 1e-3


@pytest.mark.parametrize("name", NUCLEI)
def test_nucleus_distribution(name):
    probabilities, top_p, nucleus = NUCLEI[name]
    logits = torch.tensor(probabilities).log().expand(ROWS, -1)
    is_distributed_as(next_tokens(logits, Sampling(1.0, top_p), draws(ROWS)), probabilities, nucleus)


@pytest.mark.parametrize("name", NUCLEI)
def test_sorting_gives_the_same_distribution(name):
    probabilities, top_p, nucleus = NUCLEI[name]
    rows = torch.tensor(probabilities).expand(ROWS, -1)
    is_distributed_as(_by_sorting(rows, top_p, draws(ROWS)[:, 0]), probabilities, nucleus)


def test_temperature_flattens_before_the_nucleus_is_cut():
    # At temperature 2 the weights are square roots: .64 .25 .09 .02 -> .8 .5 .3 .141, normalised .459 .287 .172 .081.
    # top_p = .6 keeps the first two, where at temperature 1 it would keep the first alone.
    weights = torch.tensor([0.64, 0.25, 0.09, 0.02])
    tokens = next_tokens(weights.log().expand(ROWS, -1), Sampling(2.0, 0.6), draws(ROWS))
    is_distributed_as(tokens, [0.8, 0.5, 0.3, 0.141], [0, 1])
    assert set(next_tokens(weights.log().expand(99, -1), Sampling(1.0, 0.6), draws(99)).tolist()) == {0}


def test_temperature_zero_is_argmax():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(next_tokens(logits, Sampling(temperature=0), draws(50)), logits.argmax(-1))


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(500, -1)
    extremes = torch.cat([torch.zeros(250, DRAWS + 1), torch.full((250, DRAWS + 1), 1 - 2**-24)])
    for top_p in (0.9, 1.0):
        tokens = next_tokens(logits, Sampling(1.0, top_p), extremes)
        assert tokens.tolist() == [1] * 250 + [3] * 250


def test_each_row_has_its_own_nucleus():
    logits = torch.full((2, 4), -10.0)
    logits[0, 2] = logits[1, 1] = 10.0
    assert next_tokens(logits, Sampling(1.0, 0.9), draws(2)).tolist() == [2, 1]


def test_half_precision_logits():
    logits = torch.tensor(NUCLEI["three of six"][0]).log().to(torch.bfloat16).expand(2000, -1)
    assert set(next_tokens(logits, Sampling(1.0, 0.7), draws(2000)).tolist()) == {1, 3, 5}


def test_uniforms_depend_on_seed_and_key_alone():
    together = uniforms(7, [11, 2**64 - 1, 13], 20)
    assert together.shape == (3, 20, DRAWS + 1)
    assert torch.equal(uniforms(7, [13], 20)[0], together[2])
    assert torch.equal(uniforms(7, [13, 11], 20)[1], together[0])
    assert torch.equal(uniforms(7, [11], 5)[0], together[0, :5])  # a longer limit does not change what came before
    assert not torch.equal(uniforms(8, [11], 20)[0], together[0])
    assert len(torch.unique(together)) > 0.99 * together.numel()  # no two rows, steps or columns share a number
    assert together.min() >= 0 and together.max() < 1
    assert torch.equal(uniforms(-1, [11], 3), uniforms(2**64 - 1, [11], 3))  # any integer is a seed


def test_every_bit_of_a_key_counts():
    # Keys are 64-bit digests; 2^63 + 5 and 2^63 + 6 are the same number in float64.
    assert not torch.equal(*uniforms(7, [2**63 + 5, 2**63 + 6], 3))


def test_uniforms_are_uniform():
    values = uniforms(0, list(range(50)), 40)
    for part in (values[..., :DRAWS], values[..., DRAWS]):
        counts = torch.histc(part.flatten(), 20, 0, 1)
        assert chisquare(counts).pvalue > 1e-3


def test_settings_at_the_edge_of_float32_are_the_most_probable_token():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 20
    draws = uniforms(0, list(range(5)), 1)[:, 0]
    for sampling in (Sampling(1e-40, 1.0), Sampling(1e-5, 0.9), Sampling(1.0, 1e-300), Sampling(1.0, 1e-12)):
        assert torch.equal(next_tokens(logits, sampling, draws), logits.argmax(-1))
