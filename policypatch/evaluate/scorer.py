"""Perplexity by a language model of another family, so that no arm is scored by the model that wrote its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch

from policypatch.evaluate.likelihoods import backbone_of
from policypatch.files.cache import rows_array
from policypatch.model.base import Base
from policypatch.model.completions import Completions
from policypatch.model.tree import Item
from policypatch.progress import track

BATCH_TOKENS = 2048  # completion tokens scored at once


def completion_nll(scorer: Base, made: Completions, samples: int) -> np.ndarray:
    """Mean per-token NLL of each continuation given its prompt, in nats: (prompts, samples).

    NaN where a continuation is empty in the scorer's own tokens. The prompt's k continuations share its tokens.

    Args:
        scorer: the language model that judges the text; its own tokenizer is used, with its special tokens.
        made: what is scored; kept in the cache under both identities.
        samples: how many of each prompt's k continuations are scored, the first ones.
    """
    about = {"completions": made.key, "scorer": asdict(scorer.identity), "samples": samples} | {
        "dtype": str(scorer.model.dtype)
    }

    def make(rows: range) -> np.ndarray:
        with track(f"perplexity by {scorer.identity.id}", len(rows)) as advance:
            return _score(scorer, made, rows, samples, advance)

    return rows_array("perplexity", about, len(made.prompts), make)


@torch.inference_mode()
def _score(scorer: Base, made: Completions, rows: range, samples: int, advance: Callable[[int], None]) -> np.ndarray:
    backbone = backbone_of(scorer)
    out = np.full((len(rows), samples), np.nan)
    for batch in _batches(made, rows, samples):
        items, places = [], []
        for i in batch:
            ends = [tuple(scorer.encode(text)) for text in made.texts[i][:samples]]
            kept = [s for s, end in enumerate(ends) if end]
            if kept:
                items.append(Item(tuple(scorer.encode_prompt(made.prompts[i])), tuple(ends[s] for s in kept)))
                places += [(i - rows.start, s) for s in kept]
        if items:
            tree = backbone.tree(items)
            lengths = torch.bincount(tree.sequence, minlength=tree.sequences)
            nll = -backbone.sequence_logprobs(tree) / lengths
            lines, columns = zip(*places, strict=True)
            out[list(lines), list(columns)] = nll.cpu().numpy()
        advance(len(batch))
    return out


def _batches(made: Completions, rows: range, samples: int) -> list[Sequence[int]]:
    """Numbers of these prompts, so many together as make about BATCH_TOKENS completion tokens."""
    at_once = max(1, BATCH_TOKENS // max(1, samples * made.max_new_tokens))
    return [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
