"""Signatures: whose they are, what they cover, and that no file in their place makes loading do anything but refuse."""

import json
import stat
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policypatch.errors import PolicyPatchError
from policypatch.patch import signature
from policypatch.patch.artifact import MANIFEST, VECTORS, far_out, load, save, sign
from policypatch.patch.signature import SIGNATURE, keygen


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return keygen(tmp_path / "keys" / "vendor")


@pytest.fixture
def folder(make_patch, keys, tmp_path: Path) -> Path:
    folder = save(make_patch(), tmp_path / "patch")
    sign(folder, keys[0])
    return folder


def refused(folder: Path, key: Path, message: str) -> None:
    with pytest.raises(PolicyPatchError, match=message) as caught:
        load(folder, require_signature=key)
    assert "\n" not in str(caught.value)


def test_signed_and_loaded(folder: Path, keys):
    assert torch.equal(load(folder, require_signature=keys[1]).vectors, load(folder).vectors)


def test_the_signature_by_hand(folder: Path, keys):
    """Ed25519 over a name for what is signed, sha256 of the manifest's bytes, and the digest of the vectors."""
    import hashlib

    content = json.loads((folder / SIGNATURE).read_text())
    manifest = (folder / MANIFEST).read_bytes()
    message = b"policypatch patch signature 1\0" + hashlib.sha256(manifest).digest()
    message += bytes.fromhex(json.loads(manifest)["sha256"])
    key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["key"]))
    key.verify(bytes.fromhex(content["signature"]), message)  # raises where it does not fit


def test_the_private_key_is_its_owners_alone_and_never_overwritten(keys):
    private, public = keys
    assert stat.S_IMODE(private.stat().st_mode) == 0o600 and public.name == "vendor.pub"
    before = private.read_bytes()
    with pytest.raises(PolicyPatchError, match="exists: a key is not overwritten"):
        keygen(private)
    assert private.read_bytes() == before and b"PRIVATE" not in public.read_bytes()


def test_without_a_signature_where_one_is_asked_for(folder: Path, keys):
    (folder / SIGNATURE).unlink()
    refused(folder, keys[1], r"is not signed: it has no patch\.sig")
    load(folder)


def test_of_another_key(folder: Path, keys, tmp_path: Path):
    _, other = keygen(tmp_path / "other")
    fingerprints = [signature.fingerprint(signature.public_key(key)) for key in (keys[1], other)]
    refused(folder, other, f"signed by the key {fingerprints[0]}, not by {fingerprints[1]}")


def test_a_manifest_that_was_changed_after_it_was_signed(folder: Path, keys):
    """Also in what says nothing: a space."""
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b" ")
    refused(folder, keys[1], "does not fit: manifest or vectors are not what was signed")
    with pytest.raises(PolicyPatchError, match="does not fit"):  # also where no signature is asked for
        load(folder)
    sign(folder, keys[0])
    load(folder, require_signature=keys[1])


def test_vectors_of_another_patch_with_their_own_manifest(folder: Path, make_patch, keys, tmp_path: Path):
    other = save(make_patch(torch.ones(5, 64)), tmp_path / "other")
    for name in (VECTORS, MANIFEST):
        (folder / name).write_bytes((other / name).read_bytes())
    refused(folder, keys[1], "does not fit")


def test_a_file_that_is_no_public_key(folder: Path, keys, tmp_path: Path):
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    (tmp_path / "rsa.pub").write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "large").write_bytes(b"x" * 10_000)
    (tmp_path / "text").write_text("hello")
    for name, message in (
        ("rsa.pub", "no Ed25519 key"),
        ("large", "more than 4,096 bytes"),
        ("text", "no public key in PEM"),
        ("nowhere", "cannot read"),
    ):
        refused(folder, tmp_path / name, message)
    refused(folder, keys[0], r"give the file that ends in \.pub")


def test_a_file_that_is_no_private_key(folder: Path, keys, tmp_path: Path):
    with pytest.raises(PolicyPatchError, match="no private key in PEM"):
        sign(folder, keys[1])
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (tmp_path / "rsa").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(PolicyPatchError, match="no Ed25519 key"):
        sign(folder, tmp_path / "rsa")


def test_what_does_not_load_is_not_signed(folder: Path, keys):
    (folder / VECTORS).write_bytes(b"no")
    with pytest.raises(PolicyPatchError, match="damaged"):
        sign(folder, keys[0])


def test_of_a_newer_format(folder: Path, keys):
    content = json.loads((folder / SIGNATURE).read_text())
    (folder / SIGNATURE).write_text(json.dumps(content | {"format": 2}))
    refused(folder, keys[1], "has format 2: upgrade policypatch")


WRONG = [{"signature": "00"}, {"signature": 7}, {"key": "zz"}, {"key": "00" * 31}, {"format": True}, {"format": 0}]


@pytest.mark.parametrize("change", [*WRONG, {"x": 1}], ids=str)
def test_a_signature_that_is_none(change: dict, folder: Path, keys):
    content = json.loads((folder / SIGNATURE).read_text())
    (folder / SIGNATURE).write_text(json.dumps(content | change))
    refused(folder, keys[1], "is no signature of policypatch")


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(content=st.binary(max_size=5000))
def test_no_bytes_in_its_place_do_anything_but_refuse(folder: Path, keys, content: bytes):
    (folder / SIGNATURE).write_bytes(content)
    with pytest.raises(PolicyPatchError):
        load(folder, require_signature=keys[1])


@FUZZ
@given(data=st.data())
def test_no_bit_of_a_signed_patch_can_change_unnoticed(folder: Path, keys, data):
    name = data.draw(st.sampled_from([VECTORS, MANIFEST, SIGNATURE]))
    original = (folder / name).read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(bytes(changed))
    try:
        patch = load(folder, require_signature=keys[1])
    except PolicyPatchError:
        return
    finally:
        (folder / name).write_bytes(original)
    # What is left has the same meaning: the case of a hex digit, white space between JSON's marks.
    assert name == SIGNATURE and json.loads(bytes(changed).lower()) == json.loads(original)
    assert torch.equal(patch.vectors, load(folder).vectors)


def test_a_manifest_that_is_too_large_is_not_read(folder: Path):
    with (folder / MANIFEST).open("wb") as file:
        file.truncate((4 << 20) + 1)
    with pytest.raises(PolicyPatchError, match="more than 4,194,304 bytes"):
        load(folder)


def test_a_mismatch_that_is_allowed_must_be_a_digest(folder: Path, identity):
    with pytest.raises(PolicyPatchError, match="allow_mismatch names weight: choose from embedding, weights"):
        load(folder, identity, ["weight"])


def test_vectors_far_from_the_bases_embeddings_are_told():
    """Lengths 3 and 4 of the embeddings: 12 is the bound above, 0.0035 that below."""
    embedding = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert far_out(torch.tensor([[12.0, 0.0], [0.0, 1.0]]), embedding) is None
    told = far_out(torch.tensor([[12.1, 0.0], [0.0, 1.0]]), embedding)
    assert told is not None and "1 of 2 vectors are far longer" in told and "(12.1;" in told
    told = far_out(torch.zeros(2, 2), embedding)
    assert told is not None and "2 of 2 vectors are far shorter" in told
