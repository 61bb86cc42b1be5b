"""A stack distilled into a shorter patch: one that gives the base the same next tokens behind fewer vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from random import Random

import torch
from omegaconf import DictConfig
from torch import Tensor

from policypatch.data.datamodule import Batch, Example, PairData
from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.completions import complete
from policypatch.model.form import Form
from policypatch.model.sampling import Sampling
from policypatch.model.tree import Item
from policypatch.train.figures import Figure, with_loss
from policypatch.train.module import StageModule
from policypatch.train.stage import optimisation, run_stage

STAGE = "squash"


class SquashModule(StageModule):
    """Mean KL(stack || patch) per token of what the base writes behind the stack (Hinton et al. 2015, with T = 1).

    The stack is the backbone's anchor.
    """

    stage = STAGE

    def losses(self, batch: Batch) -> Mapping[str, Figure]:
        """The figures of a batch."""
        kl = self.backbone.divergence(batch.tree)
        return with_loss({"kl_stack": Figure(kl.mean(), len(kl), 1.0)}, len(batch.pairs))


def shortened(stack: Tensor, length: int) -> Tensor:
    """Where training begins: `length` of the stack's vectors (S, D), evenly spread, in their order.

    Means of neighbours would be shorter than any embedding is.
    """
    if not 1 <= length < len(stack):
        raise PolicyPatchError(f"--length is {length}: it must be at least 1 and less than the stack's {len(stack)}")
    places = ((torch.arange(length) + 0.5) * len(stack) / length).long()
    return stack[places].clone()


def drawn(sets: Sequence[Sequence[str]], most: int, seed: int) -> list[str]:
    """At most so many texts, of each set as many as far as it has them, drawn by `seed`."""
    shuffled = [Random(seed).sample(list(texts), len(texts)) for texts in sets]
    turns = (text for row in zip_longest(*shuffled) for text in row if text is not None)
    return list(dict.fromkeys(turns))[:most]


def examples(
    base: Base,
    stack: Tensor,
    prompts: Sequence[tuple[Form, Sequence[str]]],
    sampling: Sampling,
    seed: int,
    rows: int,
    answer: int | None = None,
) -> list[Example]:
    """What the base writes behind the stack to each prompt, as training rows; blank answers are none.

    Args:
        base: the frozen base.
        stack: (S, D).
        prompts: of each form.
        sampling: how it writes.
        seed: of what it writes.
        rows: decoded at once.
        answer: tokens of an answer in a chat at most, where those are more than of a text: what no row has is not
            learned.
    """
    found = []
    for form, texts in prompts:
        how = replace(sampling, max_new_tokens=answer) if form.chat and answer is not None else sampling
        made = complete(base, texts, stack, 1, how, seed, rows, "what the stack writes", form)
        for i, text in enumerate(texts):
            if tokens := made.tokens[i][0]:
                prompt = tuple(base.encode_prompt(text, form))
                end = tuple(base.eos[:1]) if made.ended(i, 0) else ()
                found.append(Example(Item(prompt, ((*tokens, *end),))))
    if not found:
        raise PolicyPatchError("the base writes nothing behind the stack: there is nothing to distil")
    return found


def squashed(
    base: Base,
    stack: Tensor,
    length: int,
    rows: Sequence[Example],
    stage: DictConfig,
    trainer: DictConfig,
    folder: Path,
    seed: int,
    row_tokens: int,
) -> Tensor:
    """The patch (length, D) that training comes to; taken up again from its last checkpoint in `folder`.

    Args:
        base: the frozen base.
        stack: (S, D).
        length: of the patch, less than S.
        rows: what it learns from.
        stage: steps, batch_size, lr and the like, as `sft` in the config.
        trainer: `conf/trainer/*.yaml`.
        folder: of checkpoints and figures.
        seed: of the order of rows.
        row_tokens: see `build_tree`.
    """
    backbone = PrefixBackbone(base.model, shortened(stack, length), row_tokens)
    backbone.anchor = stack
    module = SquashModule(backbone, optimisation(stage))
    data = PairData(rows, stage.batch_size, stage.steps, seed, 1, backbone.tree, held_out=0.1)
    run_stage(module, data, stage, trainer, folder, [])
    return backbone.patch.detach().float().cpu().clone()
