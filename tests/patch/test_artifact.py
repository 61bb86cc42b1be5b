"""The artifact on disk: back as it was written, or refused with a sentence that says what is wrong."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from policypatch.errors import PolicyPatchError
from policypatch.patch.artifact import CARD, MANIFEST, TENSOR, VECTORS, digest, load, save
from policypatch.patch.card import model_card


@pytest.fixture
def folder(make_patch, tmp_path: Path) -> Path:
    return save(make_patch(), tmp_path / "patch")


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(PolicyPatchError, match=message):
        load(folder)


def test_there_and_back(make_patch, identity, tmp_path: Path):
    patch = make_patch()
    assert save(patch, tmp_path / "new" / "patch") == tmp_path / "new" / "patch"
    again = load(tmp_path / "new" / "patch", identity)
    assert again.manifest == patch.manifest
    assert again.vectors.dtype == torch.float32
    assert torch.equal(again.vectors, patch.vectors)
    assert sorted(p.name for p in (tmp_path / "new" / "patch").iterdir()) == sorted([CARD, MANIFEST, VECTORS])


def test_vectors_are_kept_to_the_bit(make_patch, tmp_path: Path):
    odd = torch.tensor([[-0.0, 1e-45], [3.4e38, 1 / 3]])  # minus zero, the least subnormal, nearly the largest
    again = load(save(make_patch(odd), tmp_path / "patch")).vectors
    assert again.numpy().tobytes() == odd.numpy().tobytes()


def test_vectors_stay_what_was_checked_when_their_file_is_written_over(folder: Path, make_patch):
    patch = load(folder)
    with (folder / VECTORS).open("r+b") as file:  # in place: the same file, other bytes
        file.seek(-4 * patch.vectors.numel(), 2)
        file.write(bytes(4 * patch.vectors.numel()))
    assert torch.equal(patch.vectors, make_patch().vectors)
    assert digest(patch.vectors) == patch.manifest.sha256


def test_saving_takes_a_parameter_and_replaces_an_older_artifact(make_patch, tmp_path: Path):
    save(make_patch(), tmp_path / "patch")
    newer = torch.nn.Parameter(torch.ones(2, 64))
    save(make_patch(newer), tmp_path / "patch")
    assert torch.equal(load(tmp_path / "patch").vectors, newer.detach())


def test_digest_by_hand():
    # Two counts as 64-bit little-endian, then the values row by row as 32-bit little-endian floats.
    expected = hashlib.sha256(struct.pack("<QQ4f", 2, 2, 1.0, 2.0, 3.0, 4.0)).hexdigest()
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert digest(vectors) == expected
    assert digest(torch.tensor([[1.0, 3.0], [2.0, 4.0]]).T) == expected  # the same values, laid out otherwise
    assert digest(vectors.reshape(1, 4)) != expected
    assert digest(vectors.T) != expected


@pytest.mark.parametrize("vectors", [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(4)])
def test_digest_takes_float32_matrices_alone(vectors):
    with pytest.raises(ValueError, match="2-D float32"):
        digest(vectors)


def test_saving_refuses_what_loading_would(make_patch, tmp_path: Path):
    good = make_patch()
    bad = good.vectors.clone()
    bad[0, 0] = torch.inf
    for patch, message in [
        (replace(good, vectors=bad), "NaN or infinite"),
        (replace(good, vectors=good.vectors + 1), "sha256 differs"),
        (replace(good, vectors=good.vectors[:4]), "shape"),
        (make_patch(name="No Good"), "name is not valid"),
    ]:
        with pytest.raises(PolicyPatchError, match=message):
            save(patch, tmp_path / "patch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [VECTORS, MANIFEST])
def test_missing_file(folder: Path, name):
    (folder / name).unlink()
    refused(folder, f"is not a patch: it has no {name}")


def test_missing_folder(tmp_path: Path):
    refused(tmp_path / "nowhere", "is not a patch")


def test_the_card_says_what_a_patch_costs(make_patch):
    cost = {"arm": "patch", "risk": "cost", "judge": None, "n": 3}
    ratio = cost | {"split": "32x1", "metric": "per_token_ratio", "value": 1.02, "low": 1.0, "high": 1.04}
    size = cost | {"split": "training", "metric": "artifact_bytes", "value": 1280, "low": 1280, "high": 1280}
    plain = make_patch()
    card = model_card(make_patch(scorecard=[*plain.manifest.scorecard, ratio, size]).manifest)
    costs = card[card.index("## What it costs") : card.index("## What it does not cover")]
    assert "5 positions of the base's context" in costs and "1280 bytes" in costs
    assert "1.02 times the base's time for each further token (1 to 1.04; prompts of 32 tokens, 1 at once" in costs
    assert "Side effects: cost" not in card


def test_card_is_not_needed(folder: Path):
    (folder / CARD).unlink()
    load(folder)


def test_changed_values(folder: Path):
    content = bytearray((folder / VECTORS).read_bytes())
    content[-4] ^= 1  # the last bit of the last number
    (folder / VECTORS).write_bytes(content)
    refused(folder, "vectors are not those of the manifest")


@pytest.mark.parametrize("size", [0, 4, 8, 20, -4, -1])
def test_truncated(folder: Path, size):
    (folder / VECTORS).write_bytes((folder / VECTORS).read_bytes()[:size])
    refused(folder, "damaged")


def test_bytes_at_the_end(folder: Path):
    (folder / VECTORS).write_bytes((folder / VECTORS).read_bytes() + b"more")
    refused(folder, "damaged")


def test_no_byte_of_the_header_can_change_unnoticed(folder: Path):
    original = (folder / VECTORS).read_bytes()
    vectors = load(folder).vectors
    header = 8 + struct.unpack("<Q", original[:8])[0]
    for i in range(header):
        content = bytearray(original)
        content[i] ^= 0x11
        (folder / VECTORS).write_bytes(content)
        try:
            got = load(folder).vectors
        except PolicyPatchError:
            continue
        assert torch.equal(got, vectors), f"byte {i}"  # padding, perhaps; the numbers are the same


def write_raw(folder: Path, header: object, body: bytes = bytes(5 * 64 * 4)) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / VECTORS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {},
        {TENSOR: 7},
        {TENSOR: {"dtype": "F32"}},
        {TENSOR: {"dtype": "F32", "shape": [5, 64], "data_offsets": [0, 4]}},
        {TENSOR: {"dtype": "F32", "shape": [5, 64], "data_offsets": [0, 1 << 62]}},
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_headers_made_up(folder: Path, header):
    write_raw(folder, header)
    refused(folder, "damaged")


def test_length_of_the_header_made_up(folder: Path):
    (folder / VECTORS).write_bytes(struct.pack("<Q", 1 << 62) + bytes(1280))
    refused(folder, "header does not fit")


def test_other_tensors(folder: Path):
    save_file({TENSOR: torch.zeros(5, 64), "more": torch.zeros(1)}, folder / VECTORS)
    refused(folder, "tensors other than 'prompt_embeddings'")
    save_file({"vectors": torch.zeros(5, 64)}, folder / VECTORS)
    refused(folder, "no tensor 'prompt_embeddings'")


def test_other_dtype(folder: Path):
    save_file({TENSOR: load_file(folder / VECTORS)[TENSOR].half()}, folder / VECTORS)
    refused(folder, r"F16 \[5, 64\] but its manifest says F32 \[5, 64\]")


def test_a_large_claim_is_refused_before_memory_is_taken(folder: Path):
    write_raw(folder, {TENSOR: {"dtype": "F32", "shape": [1 << 40, 64], "data_offsets": [0, 1 << 48]}})
    edit(folder, length=1 << 40)
    refused(folder, "bytes, which is not what its header says")


@pytest.mark.parametrize("changes", [{"length": 6}, {"width": 32}, {"length": 4, "width": 80}])
def test_wrong_shape_in_the_manifest(folder: Path, changes):
    edit(folder, **changes)
    refused(folder, r"holds F32 \[5, 64\] but its manifest says F32")


def test_nan(folder: Path):
    vectors = load_file(folder / VECTORS)[TENSOR]
    vectors[2, 3] = torch.nan
    save_file({TENSOR: vectors}, folder / VECTORS)
    edit(folder, sha256=digest(vectors))
    refused(folder, "NaN or infinite")


def test_digest_of_others(folder: Path):
    edit(folder, sha256="0" * 64)
    refused(folder, "sha256 differs")


def test_newer_format(folder: Path):
    edit(folder, format=2, something_new=True)
    refused(folder, r"patch\.json has format 2 but this policypatch reads up to 1: upgrade policypatch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"format": "1"}, "format is not valid"),
        ({"format": True}, "format is not valid"),
        ({"name": "../evil"}, "name is not valid"),
        ({"version": "1.2"}, "version is not valid"),
        ({"version": "01.2.0"}, "version is not valid"),
        ({"length": 0}, "length is not valid"),
        ({"length": 5.5}, "length is not valid"),
        ({"risks": []}, "risks is not valid"),
        ({"placement": "last"}, "placement is not valid"),
        ({"sha256": "ABC"}, "sha256 is not valid"),
        ({"parents": [{"name": "a"}]}, "parents.0 is not valid"),
        ({"base": {"id": "x"}}, "base is not valid"),
        ({"packages": {"torch": 2}}, "packages.torch is not valid"),
    ],
)
def test_manifest_values(folder: Path, changes, message):
    edit(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": NaN}', "\x00"])
def test_manifest_that_is_no_json_object(folder: Path, content):
    (folder / MANIFEST).write_text(content)
    refused(folder, r"patch\.json")


def test_every_key_is_needed(folder: Path):
    whole = json.loads((folder / MANIFEST).read_text())
    for key in whole:
        (folder / MANIFEST).write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        refused(folder, f"'{key}' is a required property")


@pytest.mark.parametrize("name", ["embedding", "weights", "config", "tokenizer", "chat_template"])
def test_other_base(folder: Path, identity, name):
    other = replace(identity, id="another", **{name: "f" * 64})
    with pytest.raises(
        PolicyPatchError, match=rf"made for tiny \(local\), and this base \(another\) differs in {name}:"
    ):
        load(folder, other)
    load(folder, other, allow_mismatch=[name])
    with pytest.raises(PolicyPatchError, match=f"differs in {name}"):
        load(folder, other, allow_mismatch={"embedding", "tokenizer", "config"} - {name})


def test_every_difference_is_named(folder: Path, identity):
    with pytest.raises(PolicyPatchError, match="differs in embedding, tokenizer: use"):
        load(folder, replace(identity, embedding="f" * 64, tokenizer="f" * 64))


def test_where_a_copy_came_from_does_not_count(folder: Path, identity):
    load(folder, replace(identity, id="mirror/tiny", revision="abc"))
