"""A base model: its tokens, its embeddings, and the digests a patch is bound to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from policypatch.errors import PolicyPatchError
from policypatch.model.form import PLAIN, Form
from policypatch.model.parts import context_of
from policypatch.patch.manifest import BaseIdentity

SAMPLED = 4096  # values of each weight tensor that go into the weights digest
# Settings of a config that say where it came from, what it is loaded as, pads with or returns.
PASSING = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "quantization_config",
    "pad_token_id",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
)


@dataclass(frozen=True)
class Base:
    """A frozen causal LM with its tokenizer and identity."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseIdentity

    @property
    def embedding(self) -> Tensor:
        """(V, D) what the tokens are embedded as."""
        return embedding_of(self.model)

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def context(self) -> int | None:
        """Positions the model has, None where it sets no limit."""
        return context_of(self.model.config)

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        eos = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def encode_prompt(self, text: str, form: Form = PLAIN) -> list[int]:
        """Token ids of what a sequence begins with.

        Plain text stands behind the BOS token of a base trained with one; a chat is what the base's own template
        writes, up to where the response begins.

        Raises:
            PolicyPatchError: a chat, and the base has no chat template or one that refuses these messages.
        """
        if form.chat:
            return self.encode_messages(form.messages(text))
        ids = self.tokenizer(form.before + text).input_ids
        return ids[:-1] if ids and ids[-1] in self.eos else ids  # some tokenizers end what is to be continued

    def encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat, up to where the response begins.

        Raises:
            PolicyPatchError: the base has no chat template, or one that refuses these messages.
        """
        if not self.tokenizer.chat_template:
            raise PolicyPatchError(
                f"{self.identity.id} has no chat template, and the prompts are requests: "
                "choose a base that was tuned for chats"
            )
        try:
            written = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError) as error:
            raise PolicyPatchError(f"the chat template of {self.identity.id} refuses a chat: {error}") from error
        return self.encode(written)  # the template itself writes the special tokens

    @property
    def start(self) -> tuple[int, ...]:
        """What a text begins after, so that its first token has a probability: BOS, else EOS; empty without either."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return tuple(token for token in known if token is not None)[:1]

    def encode(self, text: str) -> list[int]:
        """Token ids of text that follows other text: no special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, spaces as they are."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Text of a completion's token ids as it stands behind its prompt.

        Decoded alone, it would lose its first space under SentencePiece tokenizers (Llama 2, Mistral).
        """
        before, whole = self.decode(prompt), self.decode([*prompt, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self.decode(tokens)


def embedding_of(model: PreTrainedModel) -> Tensor:
    """(V, D) what a model's tokens are embedded as."""
    weight, scale = model.get_input_embeddings().weight, embedding_scale(model)
    return weight if scale is None else weight * scale.to(weight)


def embedding_scale(model: PreTrainedModel) -> Tensor | None:
    """What a model multiplies its embedding matrix by before it is an input (Gemma 3), so that a patch must as well."""
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    return None if scale is None else torch.as_tensor(scale)


def identify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, revision: str
) -> BaseIdentity:
    """The digests of a loaded model; under a second for 135 M parameters. Without a tokenizer its digests are empty."""
    embedding = model.get_input_embeddings().weight
    weights = hashlib.sha256()
    for parameter_name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // SAMPLED)]
        weights.update(f"{parameter_name} {tuple(parameter.shape)} ".encode() + _bf16_bytes(sampled))
    vocabulary = template = ""
    if tokenizer is not None:
        vocabulary = hashlib.sha256(_vocabulary(tokenizer).encode()).hexdigest()
        template = hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
    return BaseIdentity(
        id=name,
        revision=revision,
        embedding=hashlib.sha256(_bf16_bytes(embedding)).hexdigest(),
        weights=weights.hexdigest(),
        config=hashlib.sha256(json.dumps(_architecture(model), sort_keys=True).encode()).hexdigest(),
        tokenizer=vocabulary,
        chat_template=template,
        context=context_of(model.config),
    )


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        known = tokenizer.backend_tokenizer
        if known.padding is not None or known.truncation is not None:  # left behind by a call that padded
            known = type(known).from_str(known.to_str())
            known.no_padding()
            known.no_truncation()
        return known.to_str()
    return json.dumps(sorted(tokenizer.get_vocab().items()))


def _bf16_bytes(values: Tensor) -> bytes:
    return values.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def _architecture(model: PreTrainedModel) -> dict[str, Any]:
    """The settings that shape the computation, as far as they are not their class's own defaults.

    A release of transformers that adds one, at a default, so leaves every base what it was.
    """
    try:
        usual = type(model.config)().to_dict()
    except Exception:  # a class of someone's own that has no defaults: whatever it says counts
        usual = {}
    return _unusual(model.config.to_dict(), usual) | {"model_type": model.config.model_type}


def _unusual(given: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """What settings say beyond the defaults, settings within settings alike."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key in PASSING or str(key).startswith("_") or (key in usual and value == usual[key]):
            continue
        if isinstance(value, dict) and isinstance(usual.get(key), dict):
            value = _unusual(value, usual[key])
            if not value:
                continue
        found[key] = value
    return found
