"""Who vouches for a patch: an Ed25519 signature (RFC 8032) over its manifest and the digest of its vectors.

`patch.sig` stands beside the manifest. It signs the manifest's bytes as they are in the file, so there is no second way
to write the same manifest down; the vectors come in by their digest, computed anew from what was read.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import atomic_path, has_own, read_limited

SIGNATURE = "patch.sig"
FORMAT = 1
_DOMAIN = b"policypatch patch signature 1\0"  # a signature for something else is none for a patch
LIMIT = 4096  # bytes of a key or a signature


def keygen(private: Path) -> tuple[Path, Path]:
    """Write a new key pair as PEM: the private key for its owner alone, and `PRIVATE.pub` for everyone.

    Raises:
        PolicyPatchError: one of the files exists already, or cannot be written.
    """
    public = private.with_name(f"{private.name}.pub")
    key = Ed25519PrivateKey.generate()
    contents = {
        private: (key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600),
        public: (key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644),
    }
    if known := [path for path in contents if path.exists()]:
        raise PolicyPatchError(f"{known[0]} exists: a key is not overwritten, choose another name")
    try:
        private.parent.mkdir(parents=True, exist_ok=True)
        for path, (content, mode) in contents.items():
            # The mode is there from the beginning, so that nobody reads the key before it is set.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
    except OSError as error:
        raise PolicyPatchError(f"cannot write {private}: {error.strerror or error}") from error
    return private, public


def public_key(path: Path | str) -> Ed25519PublicKey:
    """A public key as `keygen` writes it.

    Raises:
        PolicyPatchError: the file is missing or is no such key.
    """
    try:
        key = load_pem_public_key(read_limited(path, LIMIT))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PolicyPatchError(f"{path} is no public key in PEM: give the file that ends in .pub") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PolicyPatchError(f"{path} is no Ed25519 key: make one with policypatch keygen")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """What people compare: sha256 of the 32 bytes of the key, its first 16 hex digits."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def signed(manifest: bytes, vectors: str, private: Path) -> str:
    """The content of `patch.sig`.

    Args:
        manifest: the bytes of `patch.json`.
        vectors: sha256 of the vectors, in hex.
        private: the private key's file.

    Raises:
        PolicyPatchError: the file is missing or is no private Ed25519 key without a password.
    """
    try:
        key = load_pem_private_key(read_limited(private, LIMIT), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise PolicyPatchError(f"{private} is no private key in PEM without a password") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise PolicyPatchError(f"{private} is no Ed25519 key: make one with policypatch keygen")
    content = {
        "format": FORMAT,
        "key": key.public_key().public_bytes_raw().hex(),
        "signature": key.sign(_message(manifest, vectors)).hex(),
    }
    return json.dumps(content, indent=2) + "\n"


def write(folder: Path, content: str) -> Path:
    """Put `patch.sig` into a patch's folder."""
    path = folder / SIGNATURE
    with atomic_path(path) as temporary:
        temporary.write_text(content, "utf-8")
    return path


def signer(folder: Path) -> Ed25519PublicKey | None:
    """The key that `patch.sig` names, whatever that is worth; None without one.

    Raises:
        PolicyPatchError: the file is not a signature.
    """
    return _read(folder)[0] if has_own(folder, SIGNATURE) else None


def check(folder: Path, manifest: bytes, vectors: str, key: Ed25519PublicKey) -> None:
    """Refuse a patch that this key's owner did not sign as it is.

    Args:
        folder: where `patch.sig` is.
        manifest: the bytes of `patch.json` as they were read.
        vectors: sha256 in hex of the vectors as they were read.
        key: whose signature is asked for.

    Raises:
        PolicyPatchError: there is no signature, it is another key's, or manifest or vectors are not what was signed.
    """
    if not has_own(folder, SIGNATURE):
        raise PolicyPatchError(f"{folder} is not signed: it has no {SIGNATURE}")
    named, signature = _read(folder)
    if named.public_bytes_raw() != key.public_bytes_raw():
        raise PolicyPatchError(
            f"{folder} is signed by the key {fingerprint(named)}, not by {fingerprint(key)}: do not use it unless you "
            "trust that key, too"
        )
    try:
        key.verify(signature, _message(manifest, vectors))
    except InvalidSignature:
        raise PolicyPatchError(
            f"{folder}: the signature of {fingerprint(key)} does not fit: manifest or vectors are not what was signed"
        ) from None


def _message(manifest: bytes, vectors: str) -> bytes:
    return _DOMAIN + hashlib.sha256(manifest).digest() + bytes.fromhex(vectors)


def _read(folder: Path) -> tuple[Ed25519PublicKey, bytes]:
    path = folder / SIGNATURE
    wrong = f"{path} is no signature of policypatch: sign the patch again"
    try:
        content: Any = json.loads(read_limited(path, LIMIT))
        if not isinstance(content, dict) or set(content) != {"format", "key", "signature"}:
            raise PolicyPatchError(wrong)
        if isinstance(content["format"], int) and content["format"] > FORMAT:
            raise PolicyPatchError(f"{path} has format {content['format']}: upgrade policypatch")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["key"]))
        signature = bytes.fromhex(content["signature"])
    except (ValueError, TypeError, RecursionError) as error:
        raise PolicyPatchError(wrong) from error
    if type(content["format"]) is not int or content["format"] != FORMAT or len(signature) != 64:  # True == 1
        raise PolicyPatchError(wrong)
    return key, signature
