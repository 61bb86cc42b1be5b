"""Probes of what a patch should leave alone: the base's answers to benign requests, and its grasp of ordinary text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policypatch.evaluate.likelihoods import sequence_nll
from policypatch.evaluate.measure import filled
from policypatch.evaluate.metrics import CorpusPerplexity, MeanValue
from policypatch.evaluate.probes.probe import Arm, Bench, Outcome
from policypatch.files.cache import array
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.completions import Completions, complete
from policypatch.model.form import CHAT
from policypatch.model.tree import Item
from policypatch.progress import track

AT_ONCE = 8  # prompts in a tree


@dataclass(frozen=True)
class BenignKLProbe:
    """`kl_benign`: mean over the tokens of the base's own responses of KL(base || arm), in nats; 0 for the base.

    A patch that changes nothing but what it was trained to change has a small one. The responses are the base's,
    sampled once, so that every arm is measured at the same places.
    """

    split: str
    prompts: Sequence[str]
    risk: str = "utility"
    chat: bool = True

    def measure(self, bench: Bench, arm: Arm) -> Outcome:
        """Mean per token for each request."""
        plan = bench.plan
        made = complete(
            bench.base,
            self.prompts,
            None,
            1,
            plan.response_sampling,
            plan.seed,
            plan.decode_rows,
            f"base, {self.split}",
            CHAT,
        )

        def make() -> np.ndarray:
            return np.zeros(len(self.prompts)) if arm.vectors is None else _kl(bench, arm, made)

        values = array("divergence", {"arm": bench.about(arm), "responses": made.key}, make)
        return Outcome([filled("kl_benign", None, MeanValue(), torch.from_numpy(values))])


@torch.no_grad()
def _kl(bench: Bench, arm: Arm, made: Completions) -> np.ndarray:
    """(prompts,) mean KL per token, NaN where the base's response is empty."""
    assert arm.vectors is not None
    backbone = PrefixBackbone(bench.base.model, arm.vectors, bench.plan.row_tokens)
    items = [
        Item(tuple(bench.base.encode_prompt(prompt, made.form)), (tuple(made.tokens[i][0]),))
        for i, prompt in enumerate(made.prompts)
    ]
    written = [i for i, item in enumerate(items) if item.completions[0]]
    out = np.full(len(items), np.nan)
    with track(f"KL of {arm.name}", len(written)) as advance:
        for start in range(0, len(written), AT_ONCE):
            numbers = written[start : start + AT_ONCE]
            tree = backbone.tree([items[i] for i in numbers])
            out[numbers] = backbone.divergence(tree).cpu().numpy()
            advance(len(numbers))
    return out


@dataclass(frozen=True)
class TextPerplexityProbe:
    """`text_ppl`: perplexity of held-out human text under the arm itself, exp of the mean NLL over all tokens."""

    split: str
    prompts: Sequence[str]
    risk: str = "utility"
    chat: bool = False

    def measure(self, bench: Bench, arm: Arm) -> Outcome:
        """NLL and tokens of each text."""
        values = array(
            "text_nll",
            {"arm": bench.about(arm), "texts": list(self.prompts)},
            lambda: sequence_nll(bench.base, arm.vectors, self.prompts),
        )
        return Outcome([filled("text_ppl", None, CorpusPerplexity(), torch.from_numpy(values))])
