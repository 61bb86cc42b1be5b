"""Judge from any causal LM that is asked a question about a response and answers with a word.

What an online run would use: HarmBench's classifier (Mazeika et al. 2024, conf/judge/harmbench.yaml) or Llama Guard
(Inan et al. 2023, conf/judge/llama_guard.yaml).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges.base import BaseJudge
from policypatch.evaluate.likelihoods import backbone_of
from policypatch.files.cache import content_key
from policypatch.model.base import Base
from policypatch.model.load import load_base
from policypatch.model.tree import Item


class VerdictJudge(BaseJudge):
    """P(yes) / (P(yes) + P(no)), where `yes` and `no` are two ways the model's answer may begin.

    A word of several tokens counts with the probability of the whole sequence.

    Args:
        model: the language model: a loaded `Base`, or a config as in conf/model/*.yaml.
        yes: the word that means 1, with the space it begins with, if any, as the model would write it.
        no: the word that means 0.
        template: the question, with the places ``{prompt}`` and ``{response}``; null asks through the model's chat
            template, which is given the request and the response as two turns.
        name: how the judge calls itself in errors and logs.
        batch_size: texts in a tree.
        max_tokens: of the response, those that are read; the rest is left out, as is the end of a longer request.
        special: whether the tokenizer's special tokens (BOS) stand before the template.

    Raises:
        PolicyPatchError: the model cannot be loaded, a place is missing from the template, there is no chat template
            to take its part, or a word is empty or the two are the same.
    """

    reads_prompt: ClassVar[bool] = True

    def __init__(
        self,
        model: Base | DictConfig | Mapping[str, Any],
        yes: str,
        no: str,
        template: str | None = None,
        name: str = "verdict",
        batch_size: int = 16,
        max_tokens: int = 512,
        special: bool = True,
    ) -> None:
        super().__init__(name, batch_size)
        if max_tokens < 1:
            raise PolicyPatchError(f"judge {name}: max_tokens is {max_tokens}: it must be at least 1")
        if template is not None and any(template.count(place) != 1 for place in ("{prompt}", "{response}")):
            raise PolicyPatchError(f"judge {name}: template must hold {{prompt}} and {{response}} once each")
        self._base = loaded(model, name)
        if template is None and not self._base.tokenizer.chat_template:
            raise PolicyPatchError(f"judge {name}: {self._base.identity.id} has no chat template: give a template")
        self._template, self._max_tokens, self._special = template, max_tokens, special
        self._words = tuple(tuple(self._base.encode(word)) for word in (yes, no))
        if not all(self._words) or self._words[0] == self._words[1]:
            raise PolicyPatchError(f"judge {name}: yes {yes!r} and no {no!r} must be two different words")
        self._backbone = backbone_of(self._base)
        self.fingerprint = "verdict:" + content_key(
            model=asdict(self._base.identity),
            dtype=str(self._base.model.dtype),
            words=self._words,
            template=template,
            max_tokens=max_tokens,
            special=special,
        )

    @torch.inference_mode()
    def _score_batch(self, texts: list[str], prompts: list[str]) -> np.ndarray:
        items = [Item(tuple(self._question(p, t)), self._words) for p, t in zip(prompts, texts, strict=True)]
        logprobs = self._backbone.sequence_logprobs(self._backbone.tree(items)).view(len(items), 2)
        return logprobs.softmax(1)[:, 0].cpu().numpy()

    def _question(self, prompt: str, response: str) -> list[int]:
        prompt, response = (
            shortened(self._base, prompt, self._max_tokens),
            shortened(self._base, response, self._max_tokens),
        )
        if self._template is None:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            asked = self._base.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            return self._base.encode(asked)
        before, after = self._template.split("{prompt}")
        # One after the other, so that a request in which "{response}" is written is left as it is.
        if "{response}" in after:
            asked = before + prompt + after.replace("{response}", response)
        else:
            asked = before.replace("{response}", response) + prompt + after
        return self._base.encode_prompt(asked) if self._special else self._base.encode(asked)


def loaded(model: Base | DictConfig | Mapping[str, Any], name: str) -> Base:
    """The language model that a judge asks.

    Raises:
        PolicyPatchError: it cannot be had, named by the judge.
    """
    if isinstance(model, Base):
        return model
    cfg = model if isinstance(model, DictConfig) else OmegaConf.create(dict(model))
    return load_base(cfg, f"judge {name}: model")


def shortened(base: Base, text: str, tokens: int) -> str:
    """The text's first `tokens` tokens, as text."""
    ids = base.encode(text)
    return text if len(ids) <= tokens else base.decode(ids[:tokens])
