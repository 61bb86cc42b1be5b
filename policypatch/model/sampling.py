"""Drawing the next token: exact nucleus sampling without sorting the vocabulary.

Sorting 49,152 probabilities for each of 256 rows takes 0.5 s on two cores, ten times the model's own forward in
bf16. Instead a token is drawn from the whole distribution by inverting its cumulative sum, and kept when it lies in
the nucleus: when the tokens more probable than it hold less than `top_p` together, which one comparison and one sum
decide. Drawing again until that holds is drawing from the nucleus renormalised (rejection sampling), and since the
nucleus holds at least `top_p` of the mass, eight draws leave one row in 10^8 to the exact sort at top_p = 0.9.

Each row has random numbers of its own, from a counter-based generator keyed by (seed, row key): a sample does not
depend on which rows share its batch, and arms compared on one prompt share their random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from policypatch.errors import Number, PolicyPatchError

DRAWS = 8  # candidates of a token; one more number serves the exact sort, as a rejected one is no longer uniform


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 is the whole distribution.
        max_new_tokens: length limit in tokens.
        min_new_tokens: end-of-sequence is impossible before this many tokens.

    Raises:
        PolicyPatchError: a field that no sampling could use.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 20
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse bad values where they live, whoever gives them."""
        Number(least=0).check("temperature", self.temperature)
        Number(above=0, most=1).check("top_p", self.top_p)
        Number(least=1, whole=True).check("max_new_tokens", self.max_new_tokens)
        Number(least=0, whole=True).check("min_new_tokens", self.min_new_tokens)
        if self.min_new_tokens > self.max_new_tokens:
            raise PolicyPatchError(
                f"min_new_tokens is {self.min_new_tokens}: it must be at most max_new_tokens ({self.max_new_tokens})"
            )


def uniforms(seed: int, keys: list[int], steps: int) -> Tensor:
    """(rows, steps, DRAWS + 1) numbers in [0, 1) that depend on (seed, key) and the step alone."""
    out = np.empty((len(keys), steps, DRAWS + 1), dtype=np.float32)
    for i, key in enumerate(keys):
        # As uint64: a list with one number above 2^63 would become float64 and lose the key's last 11 bits.
        stream = np.random.Philox(key=np.array([seed % 2**64, key % 2**64], dtype=np.uint64))
        # The last column from far along the same stream, so that more steps do not change the earlier ones.
        out[i, :, DRAWS] = np.random.Generator(stream.jumped()).random(steps, dtype=np.float32)
        out[i, :, :DRAWS] = np.random.Generator(stream).random((steps, DRAWS), dtype=np.float32)
    return torch.from_numpy(out)


def next_tokens(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Draw one token for each row.

    Args:
        logits: (B, V), any float type.
        sampling: temperature and top_p.
        draws: (B, DRAWS + 1) uniform numbers.

    Returns:
        (B,) token ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    warm = logits.float()
    if sampling.temperature < 1e-3:
        warm = warm - warm.amax(-1, keepdim=True)  # what would overflow is far below the best, and becomes -inf
    if sampling.temperature != 1:
        warm = warm / sampling.temperature
    probabilities = torch.softmax(warm, -1)
    cumulative = probabilities.cumsum(-1)
    # The sum is not exactly 1 in float32: draw within what it is, so that no index falls off the end.
    points = draws * cumulative[:, -1:] * (1 - 1e-6)
    tokens = torch.searchsorted(cumulative, points.contiguous(), right=True).clamp_(max=logits.shape[-1] - 1)
    chosen = tokens[:, 0].clone()
    if sampling.top_p >= 1:
        return chosen
    pending = torch.arange(len(logits), device=logits.device)
    for draw in range(draws.shape[1] - 1):
        candidate = tokens[pending, draw]
        rows = probabilities if len(pending) == len(probabilities) else probabilities[pending]
        kept = _mass_above(rows, rows.gather(1, candidate[:, None])) < sampling.top_p
        chosen[pending[kept]] = candidate[kept]
        pending = pending[~kept]
        if not len(pending):
            return chosen
    chosen[pending] = _by_sorting(probabilities[pending], sampling.top_p, draws[pending, -1])
    return chosen


def _mass_above(probabilities: Tensor, own: Tensor) -> Tensor:
    """(B,) probability of all tokens more probable than the row's `own` (B, 1)."""
    if probabilities.device.type == "cpu":
        # Row by row stays in the core's cache: 7 ms where the whole (128, 49,152) at once takes 40.
        rows = zip(probabilities, own[:, 0].tolist(), strict=True)
        return torch.stack([F.threshold(row, least, 0.0).sum() for row, least in rows])
    return torch.where(probabilities > own, probabilities, 0).sum(-1)


def _by_sorting(probabilities: Tensor, top_p: float, draw: Tensor) -> Tensor:
    """The textbook way, for the rows that rejection left over; tokens of equal probability stand or fall together."""
    ordered, index = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    tied = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    before = before.masked_fill(tied, 0).cummax(-1).values  # what stands before the first of equals
    cumulative = torch.where(before < max(top_p, 1e-9), ordered, 0).cumsum(-1)  # float32 has less, but rounds it to 0
    points = draw[:, None] * cumulative[:, -1:] * (1 - 1e-6)
    at = torch.searchsorted(cumulative, points.contiguous(), right=True)
    return index.gather(1, at)[:, 0]
