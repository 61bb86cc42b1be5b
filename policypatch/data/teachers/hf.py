"""Teacher `hf`: any other causal language model, a safer one, with its own tokenizer.

Only its text is needed for the pairs. Its likelihood is that of the text in its own tokens, so it can be DPO's
reference although it counts tokens otherwise than the base (arXiv 2511.08484, Eq. 3: the reference is the teacher).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from policypatch.data.pairs import Pair, Text
from policypatch.data.teachers.sampled import SampledTeacher
from policypatch.data.teachers.teacher import TeacherContext
from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.model.completions import Completions, complete
from policypatch.model.form import Form
from policypatch.model.load import load_base
from policypatch.model.logprobs import item_logprobs
from policypatch.model.tree import Item


class HfTeacher(SampledTeacher):
    """See `SampledTeacher` for what is not said here.

    Args:
        model: what `conf/model/*.yaml` describes: name, source or path, dtype, device, attention, quantize.
    """

    has_likelihood = True

    def __init__(
        self,
        model: Mapping[str, Any] | DictConfig,
        n: int,
        judges: Sequence[str],
        sampling: Mapping[str, Any],
        filter: Mapping[str, Any],
        name: str = "hf",
    ):
        super().__init__(n, judges, sampling, filter, name)
        self.config = OmegaConf.create(dict(model))

    @cached_property
    def model(self) -> Base:
        """The teacher, loaded when it is first asked for."""
        return load_base(self.config, "teacher.model")

    def identity(self) -> dict[str, Any]:
        """Everything the pairs depend on beside base, prompts and seed."""
        known = {"model": asdict(self.model.identity), "model_dtype": str(self.model.model.dtype)}
        return super().identity() | known

    def check(self, form: Form) -> None:
        """Refuse chats where the teacher has no chat template."""
        self.model.encode_prompt("A request.", form)

    def arm(self, name: str) -> Arm:
        """The model itself."""
        return replace(super().arm(name), other=self.model)

    def responses(self, context: TeacherContext, prompts: Sequence[str]) -> Completions:
        """The teacher's own."""
        return complete(
            self.model, prompts, None, self.n, self.sampling, context.seed, context.decode_rows, self.name, context.form
        )

    def _side(self, theirs: Completions, i: int, s: int) -> Text:
        return Text(theirs.texts[i][s], None, theirs.ended(i, s))  # as text: the base has other tokens for it

    def likelihood(self, context: TeacherContext, pairs: Sequence[Pair], items: Sequence[Item]) -> Tensor:
        """(pairs, 2) under the teacher, in its own tokens; see `Teacher`."""
        theirs = [self._item(context.base, pair, item) for pair, item in zip(pairs, items, strict=True)]
        return item_logprobs(self.model, None, theirs, context.row_tokens)

    def _item(self, base: Base, pair: Pair, item: Item) -> Item:
        """What the base trains on, in the teacher's tokens, with its own end where the base's ended."""
        prompt = self.model.encode_prompt(pair.prompt, pair.form)
        return Item(tuple(prompt), tuple(self._completion(base, item.prompt, tokens) for tokens in item.completions))

    def _completion(self, base: Base, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[int, ...]:
        ended = tokens[-1] in base.eos
        text = base.decode_after(prompt, tokens[:-1] if ended else tokens)
        return (*self.model.encode(text), *(self.model.eos[:1] if ended else ()))
