"""Stacks: several patches as one, their vectors one after the other in the order given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from policypatch.errors import PolicyPatchError
from policypatch.patch.artifact import Patch, digest
from policypatch.patch.lineage import now, packages
from policypatch.patch.manifest import Manifest

NAME_LIMIT = 100  # characters, as the manifest's schema has it


def stack(
    patches: Sequence[Patch],
    name: str | None = None,
    version: str = "0.1.0",
    context: int | None = None,
    alone: bool = False,
) -> Patch:
    """One patch that does what these do when they stand before the input in this order.

    It is another patch than its parts: their scorecards say nothing of it, so it has none until it is measured. A stack
    of stacks has the stacks as its parents, not their parts.

    Args:
        patches: two or more for one base, (L_i, D) each.
        name: of the stack; the parts' names joined by default.
        version: of the stack.
        context: positions of the base, by default those that a part's manifest has.
        alone: one patch may be a stack, too.

    Returns:
        the stack, (sum of L_i, D).

    Raises:
        PolicyPatchError: fewer than two patches, what `check_parts` refuses, a stack that leaves no room in the
            context, or a name or version that a manifest cannot have.
    """
    if len(patches) < (1 if alone else 2):
        raise PolicyPatchError(f"a stack needs two patches or more, not {len(patches)}")
    check_parts(patches)
    first = patches[0].manifest
    vectors = torch.cat([patch.vectors for patch in patches])
    known = next((patch.manifest.base for patch in patches if patch.manifest.base.context is not None), first.base)
    context = known.context if context is None else context
    if context is not None and len(vectors) >= context:
        raise PolicyPatchError(
            f"the stack has {len(vectors)} vectors and {first.base.id} a context of {context}: no token would fit"
        )
    manifest = Manifest(
        name=name or "_".join(patch.manifest.name for patch in patches)[:NAME_LIMIT],
        version=version,
        risks=list(dict.fromkeys(risk for patch in patches for risk in patch.manifest.risks)),
        length=vectors.shape[0],
        width=vectors.shape[1],
        base=known,
        sha256=digest(vectors),
        created=now(),
        # A part that is all of the stack is the same patch, and none is its own parent.
        parents=first.parents if digest(vectors) == first.sha256 else [patch.manifest.as_parent for patch in patches],
        packages=packages(),
        placement=first.placement,
    )
    manifest.to_json()  # a name or version of the user's own is checked here, not when it is saved
    return Patch(vectors, manifest)


def check_parts(patches: Sequence[Patch]) -> None:
    """Refuse patches that cannot stand together.

    Raises:
        PolicyPatchError: different bases or placements, or parents that lead back to where they came from, which no
            history of patches can.
    """
    first = patches[0].manifest
    for other in (patch.manifest for patch in patches[1:]):
        if differing := first.base.differences(other.base):
            raise PolicyPatchError(
                f"{first.name} was made for {first.base.id} and {other.name} for {other.base.id}, which differ in "
                f"{', '.join(differing)}: stack patches of one base"
            )
        if other.placement != first.placement:
            raise PolicyPatchError(f"{first.name} stands {first.placement} and {other.name} {other.placement}")
    known = {patch.manifest.sha256: patch.manifest for patch in patches}
    for start in known.values():
        seen, ahead = set(), [parent.sha256 for parent in start.parents if parent.base in (None, first.base.weights)]
        while ahead:
            digest_ahead = ahead.pop()
            if digest_ahead == start.sha256:
                raise PolicyPatchError(f"{start.name} is among its own parents: do not trust its manifest")
            if digest_ahead in known and digest_ahead not in seen:
                seen.add(digest_ahead)
                ahead += [parent.sha256 for parent in known[digest_ahead].parents]
