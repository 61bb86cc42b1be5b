"""Probes of what a patch should leave alone: the base's answers to benign requests, and its grasp of ordinary text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policypatch.evaluate.measure import filled
from policypatch.evaluate.metrics import CorpusPerplexity, MeanValue
from policypatch.evaluate.probes.probe import Bench, Outcome, Plan, Reading, text_nll
from policypatch.files.cache import rows_array
from policypatch.model.arm import Arm
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
    metrics: tuple[str, ...] = ("kl_benign",)
    chat: bool = True
    reads_probabilities: bool = True

    def readings(self, plan: Plan) -> list[Reading]:
        """Requests with their responses."""
        return [Reading(self.prompts, CHAT, plan.response_sampling.max_new_tokens)]

    def measure(self, bench: Bench, arm: Arm) -> Outcome:
        """Mean per token for each request."""
        if arm.other is not None:  # its tokens have no divergence from the base's
            return Outcome([])
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

        def make(rows: range) -> np.ndarray:
            return np.zeros(len(rows)) if arm.is_base else _kl(bench, arm, made, rows)

        about = {"arm": arm.identity(bench.base), "responses": made.key}
        values = rows_array("divergence", about, len(self.prompts), make)
        return Outcome([filled("kl_benign", None, MeanValue(), torch.from_numpy(values))])


@torch.no_grad()
def _kl(bench: Bench, arm: Arm, made: Completions, rows: range) -> np.ndarray:
    """(rows,) mean KL per token on these prompts, NaN where the base's response is empty."""
    form = arm.guidance.around(made.form)
    written = [i for i in rows if made.tokens[i][0]]
    theirs, ours = (
        {i: Item(tuple(bench.base.encode_prompt(made.prompts[i], f)), (tuple(made.tokens[i][0]),)) for i in written}
        for f in (made.form, form)
    )
    out = np.full(len(rows), np.nan)
    with arm.on(bench.base), track(f"KL of {arm.name}", len(written)) as advance:
        backbone = arm.backbone(bench.base, bench.plan.row_tokens)
        for start in range(0, len(written), AT_ONCE):
            numbers = written[start : start + AT_ONCE]
            tree, base_tree = (backbone.tree([items[i] for i in numbers]) for items in (ours, theirs))
            out[[i - rows.start for i in numbers]] = backbone.divergence(tree, base_tree).cpu().numpy()
            advance(len(numbers))
    return out


@dataclass(frozen=True)
class TextPerplexityProbe:
    """`text_ppl`: perplexity of held-out human text under the arm itself, exp of the mean NLL over all tokens."""

    split: str
    prompts: Sequence[str]
    risk: str = "utility"
    metrics: tuple[str, ...] = ("text_ppl",)
    chat: bool = False
    reads_probabilities: bool = True

    def readings(self, plan: Plan) -> list[Reading]:
        """The texts."""
        return [Reading(self.prompts)]

    def measure(self, bench: Bench, arm: Arm) -> Outcome:
        """NLL and tokens of each text."""
        values = torch.from_numpy(text_nll(bench, arm, self.prompts))
        return Outcome([filled("text_ppl", None, CorpusPerplexity(), values)])
