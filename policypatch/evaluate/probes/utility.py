"""Probes of what a patch should leave alone: the base's answers to benign requests, and its grasp of ordinary text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policypatch.evaluate.measure import filled
from policypatch.evaluate.metrics import CorpusPerplexity, MeanValue
from policypatch.evaluate.probes.probe import Bench, Outcome, Plan, Reading, text_nll
from policypatch.files.arrays import rows_array
from policypatch.model.arm import Arm
from policypatch.model.completions import Completions, complete
from policypatch.model.form import CHAT, Form
from policypatch.model.tree import Item

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

        def make(batches: Sequence[range]) -> Iterator[np.ndarray]:
            return (np.zeros(len(rows)) for rows in batches) if arm.is_base else _kl(bench, arm, made, batches)

        about = {"arm": arm.identity(bench.base), "responses": made.key}
        values = rows_array("divergence", about, len(self.prompts), make, f"KL of {arm.name}", AT_ONCE)
        return Outcome([filled("kl_benign", None, MeanValue(), torch.from_numpy(values))])


@torch.no_grad()
def _kl(bench: Bench, arm: Arm, made: Completions, batches: Sequence[range]) -> Iterator[np.ndarray]:
    """(rows,) mean KL per token on each batch of these prompts, NaN where the base's response is empty."""
    forms = arm.guidance.around(made.form), made.form
    with arm.on(bench.base):
        backbone = arm.backbone(bench.base, bench.plan.row_tokens)
        for rows in batches:
            out = np.full(len(rows), np.nan)
            if written := [i for i in rows if made.tokens[i][0]]:
                ours, theirs = (backbone.tree([_item(bench, made, i, form) for i in written]) for form in forms)
                out[[i - rows.start for i in written]] = backbone.divergence(ours, theirs).cpu().numpy()
            yield out


def _item(bench: Bench, made: Completions, i: int, form: Form) -> Item:
    return Item(tuple(bench.base.encode_prompt(made.prompts[i], form)), (tuple(made.tokens[i][0]),))


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
