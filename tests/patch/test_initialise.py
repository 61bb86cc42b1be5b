"""The vectors before training."""

import pytest
import torch

from policypatch.errors import PolicyPatchError
from policypatch.patch.initialise import from_random, from_text, from_vocab

# Row i holds i * 10 and i * 10 + 1.
EMBEDDING = torch.arange(6)[:, None] * 10.0 + torch.arange(2)


def test_text_repeats_to_length():
    # 5 vectors of the tokens 2 4 1: 2 4 1 2 4
    expected = [[20.0, 21.0], [40.0, 41.0], [10.0, 11.0], [20.0, 21.0], [40.0, 41.0]]
    assert from_text(EMBEDDING, [2, 4, 1], 5).tolist() == expected


def test_text_is_cut_to_length():
    assert from_text(EMBEDDING, [2, 4, 1], 2).tolist() == [[20.0, 21.0], [40.0, 41.0]]


def test_text_without_tokens():
    with pytest.raises(PolicyPatchError, match=r"init\.text has no tokens"):
        from_text(EMBEDDING, [], 5)


def test_vocab_takes_each_row_once():
    rows = from_vocab(EMBEDDING, 6, seed=0)
    assert sorted(rows.tolist()) == EMBEDDING.tolist()
    few = from_vocab(EMBEDDING, 4, seed=0)
    assert len({tuple(row) for row in few.tolist()}) == 4
    assert torch.equal(few, rows[:4])  # a longer patch begins with the shorter one's rows
    assert torch.equal(few, from_vocab(EMBEDDING, 4, seed=0))
    assert not torch.equal(few, from_vocab(EMBEDDING, 4, seed=1))


def test_random_has_the_embeddings_spread():
    embedding = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 0.3
    noise = from_random(embedding, 400, seed=0)
    assert noise.shape == (400, 64)
    assert noise.mean().abs().item() < 0.01
    assert noise.std().item() == pytest.approx(0.3, rel=0.03)
    assert torch.allclose(from_random(embedding, 400, seed=0, scale=2.0), noise * 2)
    assert not torch.equal(from_random(embedding, 400, seed=1), noise)


@pytest.mark.parametrize(
    "make",
    [lambda e: from_text(e, [1], 3), lambda e: from_vocab(e, 3, 0), lambda e: from_random(e, 3, 0)],
    ids=["text", "vocab", "random"],
)
def test_vectors_are_float32_of_their_own(make):
    embedding = torch.nn.Parameter(EMBEDDING.bfloat16())
    vectors = make(embedding)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    vectors.zero_()
    assert torch.equal(embedding.float(), EMBEDDING)
