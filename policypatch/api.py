"""What a customer's own Python code calls: `import policypatch` has these."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from policypatch.errors import PolicyPatchError
from policypatch.model import applied
from policypatch.model.base import embedding_of, identify
from policypatch.patch.artifact import Patch, check_base, check_names, far_out, load, save
from policypatch.patch.stacking import stack

__all__ = ["Patch", "PolicyPatchError", "apply", "load", "remove", "save", "stack", "using"]

AnyPatch = Patch | Path | str
OF_TOKENIZER = ("tokenizer", "chat_template")


def apply(
    model: PreTrainedModel,
    *patches: AnyPatch,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_mismatch: Collection[str] = (),
    require_signature: Path | str | None = None,
) -> PreTrainedModel:
    """Put patches before everything that a transformers model reads: `generate`, pipelines, chats, any cache.

    Args:
        model: the base that the patches were made for, with sdpa or eager attention; its weights are not changed.
        patches: loaded ones or their folders, in the order in which they stand.
        tokenizer: the model's; without it, tokenizer and chat template are not compared with those of the patch.
        allow_mismatch: digests of the base that may differ, by name.
        require_signature: public key that must have signed each; patches are given by their folders then.

    Returns:
        the model.

    Raises:
        PolicyPatchError: a patch does not load or is for another base, or the architecture is not supported.

    Warns:
        vectors far longer or shorter than the base's embeddings, which training makes none of.
    """
    found = _loaded(patches, require_signature)
    if not found:
        raise PolicyPatchError("apply needs at least one patch")
    check_names(allow_mismatch)
    bound = applied.Bound(
        identify(model, tokenizer, "the model given", "local"),
        frozenset({*allow_mismatch, *(OF_TOKENIZER if tokenizer is None else ())}),
        require_signature,
    )
    _accept(found, model, bound)
    applied.apply(model, *(patch.vectors for patch in found), bound=bound)
    return model


def remove(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it was before `apply`, bit for bit."""
    return applied.remove(model)


@contextmanager
def using(
    model: PreTrainedModel, patches: AnyPatch | Sequence[AnyPatch | None] | None, per_row: bool = False
) -> Iterator[PreTrainedModel]:
    """Another stack before the input of a model that patches were applied to, for as long as the block lasts.

    Args:
        model: the model.
        patches: a patch or a stack of them; None is the plain base.
        per_row: `patches` has one for each row of the batch instead: a patch (`a + b` for a stack) or None. A list
            with None among others is so in any case.

    Raises:
        PolicyPatchError: nothing was applied to the model, a patch is for another base than the one applied first or is
            not signed as that one had to be, or (when the model is called) there are other numbers of patches and rows.
    """
    given = [patches] if patches is None or isinstance(patches, Patch | Path | str) else list(patches)
    rows: list[list[AnyPatch] | None]
    if per_row or (None in given and len(given) > 1):
        rows = [None if patch is None else [patch] for patch in given]
    else:
        rows = [[patch for patch in given if patch is not None] or None]
    bound = None if (state := applied.state_of(model)) is None else state.bound
    loaded = [None if row is None else _loaded(row, None if bound is None else bound.key) for row in rows]
    if bound is not None:
        _accept([patch for row in loaded if row for patch in row], model, bound)
    with applied.using(model, *(None if row is None else [patch.vectors for patch in row] for row in loaded)):
        yield model


def _loaded(patches: Sequence[AnyPatch], key: Path | str | None) -> list[Patch]:
    for patch in patches:
        if key is not None and isinstance(patch, Patch):
            raise PolicyPatchError(
                f"{patch.manifest.name} is loaded already and its signature not at hand: give its folder"
            )
    return [p if isinstance(p, Patch) else load(Path(p), require_signature=key) for p in patches]


def _accept(patches: Sequence[Patch], model: PreTrainedModel, bound: applied.Bound) -> None:
    """Refuse patches for another base, and tell of vectors that no training makes, of each patch once."""
    for patch in patches:
        named = f"{patch.manifest.name} {patch.manifest.version}"
        check_base(patch.manifest, bound.identity, bound.allow_mismatch, named)
        if patch.manifest.sha256 in bound.looked_at:  # switching must not look at the whole embedding
            continue
        bound.looked_at.add(patch.manifest.sha256)
        embedding = embedding_of(model)
        if odd := far_out(patch.vectors.to(embedding.device), embedding):
            warnings.warn(f"{named}: {odd}", stacklevel=3)
