"""What a base finds likely behind a patch: whole texts, and words as the next one. Nothing is sampled or cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.head import finish_logits, token_logits
from policypatch.model.parts import sliding_window
from policypatch.model.tree import Item

ROW_TOKENS = 512
BATCH_TOKENS = 2048  # tokens in a tree


@torch.inference_mode()
def sequence_nll(
    base: Base, vectors: Tensor | None, texts: Sequence[str], prompts: Sequence[str] | None = None
) -> np.ndarray:
    """Summed negative log-likelihood of each text, in nats, and its number of tokens: (N, 2) float64.

    Args:
        base: the frozen base.
        vectors: (P, D) in front, or None for the base alone.
        texts: what is scored; an empty one has 0 nats and 0 tokens.
        prompts: what each text follows, as it stands; by default the base's start token, so that the first token of a
            text has a probability under every arm, also of a base whose tokenizer puts nothing there.

    Raises:
        PolicyPatchError: another number of prompts than texts, a text too long for the base, or neither a start token
            nor a patch.
    """
    if prompts is not None and len(prompts) != len(texts):
        raise PolicyPatchError(f"{len(prompts)} prompts do not fit {len(texts)} texts: give one for each")
    backbone = backbone_of(base, vectors)
    heads = [_head(base, prompt) for prompt in (prompts if prompts is not None else [""] * len(texts))]
    tails = [tuple(base.encode(text)) for text in texts]
    items = {i: Item(head, (tail,)) for i, (head, tail) in enumerate(zip(heads, tails, strict=True)) if tail}
    out = np.zeros((len(texts), 2))
    out[:, 1] = [len(tail) for tail in tails]
    for batch in _batches(items, base, len(backbone.patch)):
        tree = backbone.tree([items[i] for i in batch])
        nll = -backbone.completion_logprobs(tree).cpu().numpy()
        out[batch, 0] = np.bincount(tree.sequence.cpu().numpy(), weights=nll)  # sums in float64
    return out


@torch.inference_mode()
def next_word_mass(base: Base, vectors: Tensor | None, prompts: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """Probability that each word comes next: (N, W) float64.

    A word stands behind a space and counts in lower case and Capitalised together; one of several tokens has their
    product. A word that begins like a longer one of `words`, token by token, counts without it, so that the sum over
    any of the words is the probability that one of them comes next.

    Args:
        base: the frozen base.
        vectors: (P, D) in front, or None for the base alone.
        prompts: texts without the word and without the space before it.
        words: different ones, whatever their case.

    Raises:
        PolicyPatchError: no words, a word twice or an empty one, or a prompt too long for the base.
    """
    spellings = [_spellings(base, word) for word in words]
    if not words:
        raise PolicyPatchError("there are no words whose mass is asked for: give at least one")
    folded = [word.lower() for word in words]
    if twice := sorted({word for word in folded if folded.count(word) > 1}):
        raise PolicyPatchError(f"the words name {twice[0]!r} twice (case does not count): leave one out")
    column = {tokens: i for i, tokens in enumerate(dict.fromkeys(t for s in spellings for t in s))}
    # Words share beginnings, so the model reads each beginning once; what follows it is a row over the vocabulary.
    begun = list(dict.fromkeys(tokens[:n] for tokens in column for n in range(len(tokens))))
    steps = list(dict.fromkeys(tokens[:n] for tokens in column for n in range(1, len(tokens) + 1)))
    rows, ids = [begun.index(step[:-1]) for step in steps], [step[-1] for step in steps]
    logprobs = np.zeros((len(prompts), len(steps)))
    backbone = backbone_of(base, vectors)
    completions = tuple((*tokens, steps[0][0]) for tokens in begun)  # the last token only marks where one is predicted
    items = {i: Item(_head(base, prompt.rstrip()), completions) for i, prompt in enumerate(prompts)}
    for batch in _batches(items, base, len(backbone.patch)):
        tree = backbone.tree([items[i] for i in batch])
        ends = torch.bincount(tree.sequence).cumsum(0) - 1
        states = backbone.hidden(tree)[ends].split(len(begun))
        for i, state in zip(batch, states, strict=True):
            everything = finish_logits(base.model, base.model.get_output_embeddings()(state)).float().logsumexp(-1)
            logits = token_logits(base.model, state[rows], torch.tensor(ids, device=state.device))
            logprobs[i] = (logits - everything[rows]).cpu().numpy()
    path = np.array([[tokens[: len(step)] == step for tokens in column] for step in steps], dtype=float)
    mass = np.exp(logprobs @ path)
    own = _without_longer(mass, column)
    return np.stack([own[:, [column[s] for s in found]].sum(1) for found in spellings], 1)


def backbone_of(base: Base, vectors: Tensor | None = None) -> PrefixBackbone:
    """The base behind these vectors (P, D), or alone; what a batch's prompts share is computed once."""
    patch = torch.zeros(0, base.width) if vectors is None else vectors
    return PrefixBackbone(base.model, patch.to(base.model.device), ROW_TOKENS)


def _head(base: Base, prompt: str) -> tuple[int, ...]:
    return tuple(base.encode_prompt(prompt)) or base.start


def _spellings(base: Base, word: str) -> list[tuple[int, ...]]:
    """Token ids of a word in the middle of a text, in lower case and Capitalised."""
    if not word.strip():
        raise PolicyPatchError("the words hold an empty one: remove it")
    return list(dict.fromkeys(_following(base, form) for form in (word.lower(), word[0].upper() + word[1:].lower())))


def _following(base: Base, word: str) -> tuple[int, ...]:
    # Not the tokens of " he" alone: SentencePiece tokenizers begin every text with a space of their own.
    before, whole = base.encode("the"), base.encode(f"the {word}")
    return tuple(whole[len(before) :] if whole[: len(before)] == before else base.encode(f" {word}"))


def _without_longer(mass: np.ndarray, column: dict[tuple[int, ...], int]) -> np.ndarray:
    """Each sequence's mass less that of the listed ones that go on from it: (N, S), columns as `column` says."""
    own = mass.copy()
    for tokens, i in column.items():
        shorter = [tokens[:n] for n in range(len(tokens) - 1, 0, -1) if tokens[:n] in column]
        if shorter:
            own[:, column[shorter[0]]] -= mass[:, i]
    return np.maximum(own, 0.0)  # a rounding error is no negative probability


def _batches(items: dict[int, Item], base: Base, patch: int) -> Iterator[list[int]]:
    """Numbers of items, so many together as have BATCH_TOKENS tokens, in their order."""
    limits = [n for n in (base.context, sliding_window(base.model)) if n is not None]
    batch: list[int] = []
    held = 0
    for i, item in items.items():
        length = patch + len(item.prompt) + max(map(len, item.completions))
        if length > min(limits, default=length):
            raise PolicyPatchError(
                f"text {i + 1} has {length} tokens with prompt and patch, more than the {min(limits)} that "
                f"{base.identity.id} reads: shorten it"
            )
        size = len(item.prompt) + sum(map(len, item.completions))
        if batch and held + size > BATCH_TOKENS:
            yield batch
            batch, held = [], 0
        batch.append(i)
        held += size
    if batch:
        yield batch
