"""The base with patches as words of its vocabulary, as a model folder that transformers and vLLM load."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policypatch.errors import PolicyPatchError
from policypatch.export.words import NONE, UNLIKELY, Words, with_patches, words_of
from policypatch.files.atomic import atomic_folder, write_json
from policypatch.model.backbone import plain_logits
from policypatch.model.base import Base
from policypatch.model.load import NO_CODE
from policypatch.patch.artifact import Patch, check_base

ABOUT = "policypatch.json"  # what the folder was made of
PROBE = [5, 6, 7, 8, 9, 10]  # tokens that the exported folder is tried on
CHATS = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b"}],
)


def export_tokens(
    base: Base,
    patches: Sequence[Patch],
    out: Path,
    default: str = NONE,
    in_text: bool = False,
    allow_mismatch: Collection[str] = (),
) -> Words:
    """Write a model folder whose vocabulary has the patches' vectors as special tokens.

    The folder is loaded again and compared with the base behind the vectors before it is left in place.

    Args:
        base: loaded for this: its model and tokenizer are changed.
        patches: for this base.
        out: the folder.
        default: the stack (names joined by +, or none) that the chat template puts first unless a request says
            otherwise.
        in_text: whether the tokenizer puts it before plain text as well.
        allow_mismatch: digests of the base that may differ.

    Returns:
        the words.

    Raises:
        PolicyPatchError: a patch is for another base, names do not fit, or what was written does not compute what the
            base behind the vectors does, or would write words that it should not.
    """
    for patch in patches:
        check_base(patch.manifest, base.identity, allow_mismatch, patch.manifest.name, base.width)
    words = words_of(base, patches)
    words.names(default)
    before = {patch.manifest.name: _logits(base.model, patch.vectors) for patch in patches}
    before[NONE] = _logits(base.model, patches[0].vectors[:0])
    chats, size = _chats(base.tokenizer), before[NONE].shape[1]
    ids = _extend_tokenizer(base.tokenizer, words, default, in_text)
    size = min(size, min(ids))  # where the embedding was padded, the words take the rows that no token had
    _extend_model(base.model, words, ids)
    about = {"base": base.identity.id, "default": default, "in_text": in_text}
    about |= {"highest_logit": words.highest, "highest_probability": words.likeliest}
    about |= {"patches": [patch.manifest.to_json() | {"words": words.of[patch.manifest.name]} for patch in patches]}
    with atomic_folder(out) as temporary:
        base.model.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
        write_json(temporary / ABOUT, about)
        _check(temporary, base.model.dtype, words, before, chats, size)
    return words


def _extend_tokenizer(tokenizer: PreTrainedTokenizerBase, words: Words, default: str, in_text: bool) -> list[int]:
    """Add the words, and put the default first; the words' ids."""
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words.all], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(words.all)
    templates = tokenizer.chat_template
    if not templates and default != NONE and not in_text:
        raise PolicyPatchError(
            "this base has no chat template to put words first: leave out --default, or say --in-text"
        )
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: with_patches(text, words, default) for name, text in templates.items()}
    elif templates:
        tokenizer.chat_template = with_patches(templates, words, default)
    if in_text and default != NONE:
        if not tokenizer.is_fast:
            raise PolicyPatchError(
                "this base's tokenizer is of the slow kind and cannot put words before text by itself"
            )
        backend, first = tokenizer.backend_tokenizer, [word for name in words.names(default) for word in words.of[name]]
        # One piece of the template that stands for all words: their own names hold colons, which mean types there.
        piece = {"id": "patch", "ids": tokenizer.convert_tokens_to_ids(first), "tokens": first}
        ours = processors.TemplateProcessing(["patch", "$A"], ["patch", "$A", "$B:1"], special_tokens=[piece])
        old = backend.post_processor
        backend.post_processor = ours if old is None else processors.Sequence([old, ours])
    return ids


@torch.no_grad()
def _extend_model(model: PreTrainedModel, words: Words, ids: Sequence[int]) -> None:
    """Give the words their rows. The output head gets a matrix of its own, where it was the embedding's."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight.data_ptr() == embedding.weight.data_ptr():
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.resize_token_embeddings(max(len(embedding.weight), max(ids) + 1), mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight[ids] = words.rows.to(embedding.weight)
    head.weight[ids] = words.head.to(head.weight)
    if head.bias is not None:
        head.bias[ids] = 0
    model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or ()), *ids]


@torch.no_grad()
def _logits(model: PreTrainedModel, front: Tensor) -> Tensor:
    """(T, V) over the probe behind vectors (P, D)."""
    return plain_logits(model, front.to(model.device), PROBE[:1], PROBE[1:])


def _chats(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    templates = tokenizer.chat_template
    if not templates or (isinstance(templates, dict) and "default" not in templates):
        return []
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]


@torch.no_grad()
def _check(
    folder: Path, dtype: torch.dtype, words: Words, before: dict[str, Tensor], chats: list[str], size: int
) -> None:
    """Refuse a folder that does not do what the base behind the vectors does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **NO_CODE).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    new = tokenizer.convert_tokens_to_ids(words.all)
    for stack, expected in before.items():
        text, names = words.text(stack), words.names(stack)
        ids = tokenizer(text, add_special_tokens=False).input_ids if text else []
        if ids != tokenizer.convert_tokens_to_ids([word for name in names for word in words.of[name]]):
            raise PolicyPatchError(f"the tokenizer does not read the words of {stack} as such: it cannot be extended")
        logits = model(torch.tensor([[*ids, *PROBE]], device=model.device)).logits[0, len(ids) : -1].float()
        found = logits[:, :size]
        worst = ((found - expected[:, :size].to(found)).abs().max() / expected.std().clamp(min=1e-6)).item()
        if not worst <= (1e-3 if dtype == torch.float32 else 0.2):
            raise PolicyPatchError(
                f"behind the words of {stack} the exported model's logits differ by {worst:.1e} of their spread from "
                f"those behind the vectors: {type(model).__name__} cannot be exported so"
            )
        written = logits.softmax(1)[:, new].sum(1).max().item()
        if words.likeliest < UNLIKELY and not written < UNLIKELY:
            raise PolicyPatchError(
                f"behind the words of {stack} the exported model would write a word with probability {written:.1e}: "
                f"{type(model).__name__} cannot be exported so"
            )
        for chat, old in zip(CHATS, chats, strict=False):
            now = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, patch=stack)
            if now != text + old:
                raise PolicyPatchError("the base's chat template does not go on as before behind the words of a patch")
