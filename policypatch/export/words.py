"""A patch as words: new special tokens whose embeddings are its vectors.

An engine that knows models and tokens, and nothing of patches, then serves it: a patch is a string before the prompt, a
stack is two strings, and the engine's own prefix cache keeps their keys and values. The words must never be written by
the model. No engine but transformers reads `suppress_tokens` from a file, so the words' rows of the output head see to
it themselves: they are fitted to have a logit of about -100 wherever the base can come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policypatch.errors import PolicyPatchError
from policypatch.model.base import Base, embedding_scale
from policypatch.model.decode import sample
from policypatch.model.head import finish_logits
from policypatch.model.parts import decoder_of
from policypatch.model.sampling import Sampling
from policypatch.patch.artifact import Patch

NONE = "none"  # in the place of a patch's name: the plain base
LOGIT = -100.0  # of a word, aimed at; others have tens
ENOUGH = -20.0  # what a word's logit must stay below wherever it was tried, or its row of the head is left at zero
UNLIKELY = 1e-6  # a word that is likelier than this may be written, which the user is told
STARTS, LENGTH = 32, 48  # texts that the base writes to fit the rows on, and their tokens


@dataclass(frozen=True)
class Words:
    """Patches as words of a base's vocabulary.

    Attributes:
        of: the words of each patch, by its name, in the order in which they stand.
        rows: (N, D) float32, what the input embedding holds for all of them.
        head: (D,) what the output head holds for each.
        highest: the highest logit that a word had on text that `head` was not fitted to.
        likeliest: the highest probability that all words had together there.
        bos: the token that the base's tokenizer puts before every text by itself, None where it does not.
    """

    of: dict[str, list[str]]
    rows: Tensor
    head: Tensor
    highest: float
    likeliest: float
    bos: str | None = None

    @property
    def all(self) -> list[str]:
        """Every word, in the order of `rows`."""
        return [word for words in self.of.values() for word in words]

    def text(self, stack: str) -> str:
        """What stands before a prompt to have a stack of patches there.

        Args:
            stack: names joined by +, or none.

        Raises:
            PolicyPatchError: a name that no patch has.
        """
        return "".join("".join(self.of[name]) for name in self.names(stack))

    def names(self, stack: str) -> list[str]:
        """The patches of a stack."""
        names = [] if stack == NONE else stack.split("+")
        if unknown := [name for name in names if name not in self.of]:
            raise PolicyPatchError(f"there is no patch {unknown[0]!r}: choose from {', '.join([*self.of, NONE])}")
        return names


def words_of(base: Base, patches: Sequence[Patch]) -> Words:
    """Words for patches of a base.

    Raises:
        PolicyPatchError: no patch, two of one name, or one that is called none.
    """
    names = [patch.manifest.name for patch in patches]
    if not names:
        raise PolicyPatchError("there is no patch to export")
    if twice := [name for name in names if names.count(name) > 1]:
        raise PolicyPatchError(
            f"two patches are called {twice[0]}: words are told apart by name, so export one of them"
        )
    if NONE in names:
        raise PolicyPatchError(f"a patch is called {NONE}, which is how the plain base is asked for: rename it")
    known = set(base.tokenizer.get_vocab())
    of = {}
    for patch in patches:
        manifest = patch.manifest
        of[manifest.name] = [f"<|{manifest.name}@{manifest.version}:{i}|>" for i in range(manifest.length)]
        if known.intersection(of[manifest.name]):
            raise PolicyPatchError(
                f"the base has words of {manifest.name} {manifest.version} already: export to the base"
            )
    vectors = torch.cat([patch.vectors for patch in patches]).float()
    head, highest, likeliest = silent_row(base, [patch.vectors for patch in patches], len(vectors))
    first = base.tokenizer("A").input_ids[0]
    bos = base.tokenizer.bos_token if first == base.tokenizer.bos_token_id else None
    scale = embedding_scale(base.model)  # the base multiplies the rows by it again
    return Words(of, vectors if scale is None else vectors / scale.float().cpu(), head, highest, likeliest, bos)


@torch.no_grad()
def silent_row(base: Base, fronts: Sequence[Tensor], number: int) -> tuple[Tensor, float, float]:
    """A row of the output head that keeps a token from being written, whatever came before.

    The states that the head reads have a direction in common (final norms see to that), so least squares finds a row
    that has about the same product with all of them. Where it does not, the row is zero, as is then the logit.

    Args:
        base: the base.
        fronts: vectors (L, D) that may stand before a text, each alone.
        number: how many tokens will have this row.

    Returns:
        the row (D,) float32; on texts that it was not fitted to, its highest logit and the highest probability that
        `number` such tokens have together.
    """
    model, generator = base.model, torch.Generator().manual_seed(0)
    starts = torch.randint(model.get_input_embeddings().weight.shape[0], (STARTS,), generator=generator).tolist()
    written = sample(model, [[start] for start in starts], sampling=Sampling(1.0, 1.0, LENGTH, LENGTH), eos=base.eos)
    texts = torch.tensor([[start, *text[0]] for start, text in zip(starts, written, strict=True)], device=model.device)
    states = [_states(base, texts, None), *(_states(base, texts, front) for front in fronts)]
    half = STARTS // 2
    fitted = torch.cat([state[:half].flatten(0, 1) for state in states])
    others = torch.cat([state[half:].flatten(0, 1) for state in states])
    unit = float(finish_logits(model, torch.tensor(1e-3))) / 1e-3  # some models scale their logits after the head
    gram = fitted.T @ fitted
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    row = (torch.linalg.solve(gram + ridge, fitted.sum(0)) * (LOGIT / unit)).float()
    logits = finish_logits(model, others @ row.double())
    if not logits.max() < ENOUGH:
        row, logits = torch.zeros_like(row), torch.zeros_like(logits)
    head = model.get_output_embeddings()
    everything = torch.cat(
        [
            finish_logits(model, head(part.to(model.device, model.dtype))).float().logsumexp(1).cpu()
            for part in others.split(256)
        ]
    )
    return row, logits.max().item(), (number * (logits.float() - everything).exp()).max().item()


def _states(base: Base, texts: Tensor, front: Tensor | None) -> Tensor:
    """What the output head reads over texts (B, T): (B, T, D) float64 on the CPU."""
    tokens = base.model.get_input_embeddings()(texts)
    if front is not None:
        tokens = torch.cat([front.to(tokens).expand(len(texts), -1, -1), tokens], 1)
    states = decoder_of(base.model)(inputs_embeds=tokens, use_cache=False).last_hidden_state
    return states[:, -texts.shape[1] :].double().cpu()


def with_patches(template: str, words: Words, default: str) -> str:
    """A chat template that puts words first: those of `default`, or of what a request gives it as `patch`.

    `apply_chat_template(messages, patch="tox+bias")`, `patch="none"`; engines call it `chat_template_kwargs`.

    Raises:
        PolicyPatchError: `default` names no patch.
    """
    words.names(default)
    table = ", ".join(f'"{name}": "{"".join(of)}"' for name, of in words.of.items())
    return (
        f"{{%- set patch_words = {{{table}}} -%}}"
        f'{{%- set chosen = patch if patch is defined and patch is not none else "{default}" -%}}'
        f'{{%- if chosen and chosen != "{NONE}" -%}}{{%- for name in chosen.split("+") -%}}'
        '{%- if name not in patch_words -%}{{- raise_exception("there is no patch " + name) -}}{%- endif -%}'
        "{{- patch_words[name] -}}{%- endfor -%}{%- endif %}\n" + template  # engines drop a line's end behind a block
    )
