"""Teacher `guided`: the base itself, told how to respond.

Its responses are those the base gives under a safety system prompt and a few exemplary turns, or behind an
instruction (a text to continue); the patch learns to give them without. On benign prompts the teacher is the base as it
is. Its likelihood is the base's under the same guidance, so it can be DPO's reference (arXiv 2511.08484, Eq. 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from policypatch.data.pairs import Pair
from policypatch.data.teachers.sampled import SampledTeacher
from policypatch.data.teachers.teacher import TeacherContext
from policypatch.errors import PolicyPatchError
from policypatch.model.arm import Arm
from policypatch.model.completions import Completions, complete
from policypatch.model.form import CHAT, PLAIN, Form, Guidance
from policypatch.model.logprobs import item_logprobs
from policypatch.model.tree import Item


class GuidedTeacher(SampledTeacher):
    """See `SampledTeacher` for what is not said here.

    Args:
        system: system message, for risks that ask in chats.
        turns: exemplary exchanges, each with `request` and `response`, for risks that ask in chats.
        before: instruction that stands before a text to continue, for the other risks.

    Raises:
        PolicyPatchError: no guidance at all, or a turn without request or response.
    """

    has_likelihood = True

    def __init__(
        self,
        n: int,
        judges: Sequence[str],
        sampling: Mapping[str, Any],
        filter: Mapping[str, Any],
        system: str | None = None,
        turns: Sequence[Mapping[str, str]] = (),
        before: str = "",
        name: str = "guided",
    ):
        super().__init__(n, judges, sampling, filter, name)
        if not (system or turns or before):
            raise PolicyPatchError("teacher has no guidance: set teacher.system, teacher.turns or teacher.before")
        for number, turn in enumerate(turns or (), 1):
            if set(turn) != {"request", "response"} or not all(isinstance(v, str) and v.strip() for v in turn.values()):
                raise PolicyPatchError(f"teacher.turns, turn {number}: give a request and a response, both text")
        exchanges = tuple((turn["request"], turn["response"]) for turn in turns or ())
        self.guidance = Guidance(system, exchanges, before)

    def identity(self) -> dict[str, Any]:
        """Everything the pairs depend on beside base, prompts and seed."""
        return super().identity() | {
            "chat": asdict(self.guidance.around(CHAT)),
            "plain": asdict(self.guidance.around(PLAIN)),
        }

    def check(self, form: Form) -> None:
        """Refuse prompts of a form that there is no guidance for."""
        self.form(form)

    def arm(self, name: str) -> Arm:
        """The base under guidance."""
        return replace(super().arm(name), guidance=self.guidance)

    def responses(self, context: TeacherContext, prompts: Sequence[str]) -> Completions:
        """The base's under guidance."""
        form, seed = self.form(context.form), context.seed
        return complete(
            context.base, prompts, None, self.n, self.sampling, seed, context.decode_rows, f"teacher {self.name}", form
        )

    def likelihood(self, context: TeacherContext, pairs: Sequence[Pair], items: Sequence[Item]) -> Tensor:
        """(pairs, 2) under the base with guidance, without it on benign prompts; see `Teacher`."""
        guided = [
            item if pair.kind != "pair" else Item(self._prompt(context, pair), item.completions)
            for pair, item in zip(pairs, items, strict=True)
        ]
        return item_logprobs(context.base, None, guided, context.row_tokens)

    def _prompt(self, context: TeacherContext, pair: Pair) -> tuple[int, ...]:
        return tuple(context.base.encode_prompt(pair.prompt, self.form(pair.form)))

    def form(self, form: Form) -> Form:
        """The guidance for prompts of this form."""
        if form.chat and self.guidance.system is None and not self.guidance.turns:
            raise PolicyPatchError("this risk asks in chats: set teacher.system or teacher.turns")
        if not form.chat and not self.guidance.before:
            raise PolicyPatchError("this risk's prompts are texts to continue: set teacher.before")
        return self.guidance.around(form)
