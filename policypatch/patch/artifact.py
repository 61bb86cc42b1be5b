"""The patch as a folder: `patch.safetensors` (the vectors), `patch.json` (the manifest), `README.md` (the card).

Nothing in it is ever executed. Loading refuses, with a sentence that says what differs, whatever does not match.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import (
    atomic_folder,
    atomic_path,
    has_own,
    parse_json,
    read_limited,
    write_json,
    write_text,
)
from policypatch.patch import signature
from policypatch.patch.card import model_card
from policypatch.patch.manifest import BaseIdentity, Manifest

VECTORS, MANIFEST, CARD = "patch.safetensors", "patch.json", "README.md"
MANIFEST_LIMIT = 4 << 20  # bytes: a scorecard of ten thousand rows has less
FAR, SHORT = 3.0, 1e-3  # of the base's longest and median embedding, beyond which training puts no vector
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
TENSOR = "prompt_embeddings"  # the key of PEFT's prompt-tuning files, so that one name serves both


@dataclass(frozen=True)
class Patch:
    """Vectors (L, D) float32 and the manifest that describes them; `a + b` is `stacking.stack([a, b])`."""

    vectors: Tensor
    manifest: Manifest

    def __add__(self, other: Patch) -> Patch:
        """Both as one, this one first."""
        from policypatch.patch.stacking import stack  # it makes patches, as this does

        return stack([self, other])


def digest(vectors: Tensor) -> str:
    """sha256 in hex of shape and values: little-endian float32, row by row."""
    if vectors.dtype != torch.float32 or vectors.dim() != 2:
        raise ValueError(f"vectors must be 2-D float32, not {vectors.dim()}-D {vectors.dtype}")
    h = hashlib.sha256(struct.pack("<QQ", *vectors.shape))
    h.update(vectors.detach().cpu().contiguous().numpy().astype("<f4").tobytes())
    return h.hexdigest()


def save(patch: Patch, folder: Path, written: bytes | None = None) -> Path:
    """Write the artifact, all of it or nothing.

    Args:
        patch: the patch.
        folder: what is written.
        written: the manifest's bytes where it was read from a file, so that a signature of these goes on to fit.
    """
    _check_vectors(patch.vectors, patch.manifest, str(folder))
    with atomic_folder(folder) as temporary:
        save_file({TENSOR: patch.vectors.detach().cpu().contiguous()}, temporary / VECTORS)
        write_manifest(temporary / MANIFEST, patch.manifest, written)
        write_text(temporary / CARD, model_card(patch.manifest))
    return folder


def write_manifest(path: Path, manifest: Manifest, written: bytes | None = None) -> None:
    """The manifest as a file; the bytes that it was read from where they are given."""
    if written is None:
        write_json(path, manifest.to_json())
    else:
        with atomic_path(path) as temporary:
            temporary.write_bytes(written)


def load(
    folder: Path | str,
    base: BaseIdentity | None = None,
    allow_mismatch: Collection[str] = (),
    require_signature: Path | str | None = None,
) -> Patch:
    """Read and check an artifact.

    Args:
        folder: where it is.
        base: the base it is to be applied to; None skips that check.
        allow_mismatch: digests of the base that may differ, by name ("tokenizer", "chat_template", ...).
        require_signature: the public key whose owner must have signed it; None asks for no signature, and one that
            is there must fit all the same.

    Raises:
        PolicyPatchError: a file is missing, the manifest is not valid or of a newer format, the vectors are not what
            the manifest says (shape, dtype, digest, not finite), the signature is missing, another key's or does not
            fit, the base differs, or `allow_mismatch` names no digest.
    """
    folder = Path(folder)
    check_names(allow_mismatch)
    key = None if require_signature is None else signature.public_key(require_signature)
    return _read(folder, base, allow_mismatch, key)


def _read(
    folder: Path,
    base: BaseIdentity | None = None,
    allow_mismatch: Collection[str] = (),
    key: Ed25519PublicKey | None = None,
    signed: bool = True,
) -> Patch:
    """See `load`; without `signed` whatever signature lies there is not looked at."""
    for name in (VECTORS, MANIFEST):
        if not has_own(folder, name):
            raise PolicyPatchError(f"{folder} is not a patch: it has no {name}")
    written = read_limited(folder / MANIFEST, MANIFEST_LIMIT)
    manifest = Manifest.from_json(parse_json(written, folder / MANIFEST), str(folder / MANIFEST))
    check_header(folder / VECTORS, [manifest.length, manifest.width])
    try:
        # A copy: what safetensors gives is the file itself, in which the vectors could change after they were checked.
        vectors = load_file(folder / VECTORS)[TENSOR].clone()
    except SafetensorError as error:  # offsets that do not fit, which the header's own check leaves to the reader
        raise PolicyPatchError(f"{folder / VECTORS} is damaged: {error}") from error
    _check_vectors(vectors, manifest, str(folder))
    # A signature that does not fit is told whoever asks for one: manifest or vectors were changed after it.
    if key is not None or (signed and (key := signature.signer(folder)) is not None):
        signature.check(folder, written, manifest.sha256, key)
    if base is not None:
        check_base(manifest, base, allow_mismatch, str(folder))
    return Patch(vectors, manifest)


def check_names(allow_mismatch: Collection[str]) -> None:
    """Refuse what is no digest of a base: it would seem to allow something and allow nothing."""
    if unknown := set(allow_mismatch) - set(BaseIdentity.digests()):
        raise PolicyPatchError(
            f"allow_mismatch names {sorted(unknown)[0]}: choose from {', '.join(BaseIdentity.digests())}"
        )


def check_base(
    manifest: Manifest, base: BaseIdentity, allow_mismatch: Collection[str], what: str, width: int | None = None
) -> None:
    """Refuse a base that differs from the one a patch was made for in more than what is allowed; `what` is named.

    No name allows another width (of its embeddings, where that is given): the vectors would fit nowhere.
    """
    if width is not None and manifest.width != width:
        raise PolicyPatchError(f"{what} has vectors of width {manifest.width}, and this base takes {width}")
    if differing := [name for name in manifest.base.differences(base) if name not in allow_mismatch]:
        raise PolicyPatchError(
            f"{what} was made for {manifest.base.id} ({manifest.base.revision}), and this base "
            f"({base.id}) differs in {', '.join(differing)}: use the base it was made for"
        )


def sign(folder: Path, private: Path) -> Path:
    """Sign an artifact as it is; one that was signed before is signed anew.

    Raises:
        PolicyPatchError: it does not load, or the key is none.
    """
    patch = _read(Path(folder), signed=False)
    written = read_limited(Path(folder) / MANIFEST, MANIFEST_LIMIT)
    return signature.write(Path(folder), signature.signed(written, patch.manifest.sha256, private))


def far_out(vectors: Tensor, embedding: Tensor) -> str | None:
    """What is odd about vectors whose length is far from that of the base's embeddings; None where nothing is.

    Args:
        vectors: (L, D).
        embedding: (V, D) of the base.
    """
    ours, theirs = vectors.float().norm(dim=1), embedding.float().norm(dim=1)
    long, short = int((ours > FAR * theirs.max()).sum()), int((ours < SHORT * theirs.median()).sum())
    if not (long or short):
        return None
    number, what, figure = (long, "longer", ours.max()) if long else (short, "shorter", ours.min())
    return (
        f"{number} of {len(ours)} vectors are far {what} than training makes them ({figure:.3g}; the base's embeddings "
        f"have {theirs.min():.3g} to {theirs.max():.3g}): the patch may be broken, or made to do harm"
    )


def check_header(path: Path, expected: list[int], dtypes: Collection[str] = ("F32",), by: str = "its manifest") -> None:
    """Compare a file's own header with what it should hold, before any of it is allocated.

    Args:
        path: of a safetensors file.
        expected: shape of its one matrix.
        dtypes: that it may have, as safetensors names them.
        by: what says so.

    Raises:
        PolicyPatchError: it holds anything else, or its size is not what its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size, 1 << 20):
            raise PolicyPatchError(f"{path} is damaged: its header does not fit in the file")
        try:
            header = json.loads(f.read(length))
            entry = header[TENSOR]
            shape, dtype = entry["shape"], entry["dtype"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PolicyPatchError(f"{path} is damaged or holds no tensor {TENSOR!r}") from error
    if set(header) - {TENSOR, "__metadata__"}:
        raise PolicyPatchError(f"{path} holds tensors other than {TENSOR!r}")
    if shape != expected or dtype not in dtypes:
        raise PolicyPatchError(f"{path} holds {dtype} {shape} but {by} says {' or '.join(dtypes)} {expected}")
    if size != 8 + length + BYTES[dtype] * expected[0] * expected[1]:
        raise PolicyPatchError(f"{path} has {size} bytes, which is not what its header says: it is damaged")


def _check_vectors(vectors: Tensor, manifest: Manifest, where: str) -> None:
    if list(vectors.shape) != [manifest.length, manifest.width]:
        raise PolicyPatchError(
            f"{where}: vectors of shape {list(vectors.shape)}, manifest says {[manifest.length, manifest.width]}"
        )
    if not torch.isfinite(vectors).all():
        raise PolicyPatchError(f"{where}: the vectors hold NaN or infinite values")
    if digest(vectors) != manifest.sha256:
        raise PolicyPatchError(f"{where}: the vectors are not those of the manifest (sha256 differs)")
