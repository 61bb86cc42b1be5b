"""Perplexity by a language model of another family, so that no arm is scored by the model that wrote its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch

from policypatch.evaluate.likelihoods import backbone_of
from policypatch.files.arrays import rows_array
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.completions import Completions
from policypatch.model.tree import Item

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

    def make(batches: Sequence[range]) -> Iterator[np.ndarray]:
        backbone = backbone_of(scorer)
        for rows in batches:
            yield _nll(scorer, backbone, made, rows, samples)

    at_once = max(1, BATCH_TOKENS // max(1, samples * made.max_new_tokens))
    what = f"perplexity by {scorer.identity.id}"
    return rows_array("perplexity", about, len(made.prompts), make, what, at_once)


@torch.inference_mode()
def _nll(scorer: Base, backbone: PrefixBackbone, made: Completions, rows: range, samples: int) -> np.ndarray:
    """(rows, samples) of these prompts, in one tree."""
    out = np.full((len(rows), samples), np.nan)
    items, places = [], []
    for line, i in enumerate(rows):
        ends = [tuple(scorer.encode(text)) for text in made.texts[i][:samples]]
        kept = [s for s, end in enumerate(ends) if end]
        if kept:
            items.append(Item(tuple(scorer.encode_prompt(made.prompts[i])), tuple(ends[s] for s in kept)))
            places += [(line, s) for s in kept]
    if items:
        tree = backbone.tree(items)
        lengths = torch.bincount(tree.sequence, minlength=tree.sequences)
        nll = -backbone.sequence_logprobs(tree) / lengths
        lines, columns = zip(*places, strict=True)
        out[list(lines), list(columns)] = nll.cpu().numpy()
    return out
