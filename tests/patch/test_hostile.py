"""Patches made to do harm: loading refuses them in one sentence, at once, and reads nothing outside their folder."""

import io
import json
import os
import re
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from policypatch.errors import PolicyPatchError
from policypatch.patch.artifact import MANIFEST, TENSOR, VECTORS, load, save
from policypatch.patch.card import model_card
from policypatch.patch.manifest import COST, Manifest
from policypatch.patch.peft_layout import load_peft, save_peft
from policypatch.patch.signature import SIGNATURE
from policypatch.report.metrics import METRICS
from policypatch.report.table import scorecard_table

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture
def folder(make_patch, tmp_path: Path) -> Path:
    return save(make_patch(), tmp_path / "patch")


def shown(manifest: Manifest) -> str:
    """Card and table, as `policypatch info` prints it."""
    console = Console(file=io.StringIO(), width=80)
    console.print(scorecard_table(manifest.scorecard))
    return model_card(manifest) + console.file.getvalue()


def refused(folder: Path, message: str) -> None:
    with pytest.raises(PolicyPatchError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [VECTORS, MANIFEST, SIGNATURE])
def test_a_pipe_in_a_files_place_does_not_hang(folder: Path, name: str):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, f"{name} is no file")


@pytest.mark.parametrize("name", [VECTORS, MANIFEST, SIGNATURE])
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, name: str, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    refused(folder, "leads out of its folder")


def test_a_hub_caches_links_are(folder: Path, tmp_path: Path):
    """models--a--b/snapshots/REVISION/FILE -> ../../blobs/DIGEST"""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert load(snapshot).manifest.name == "toxicity-tiny"


@FUZZ
@given(data=JSON)
def test_any_json_for_a_manifest(folder: Path, data):
    (folder / MANIFEST).write_text(json.dumps(data))
    refused(folder, ".")


@FUZZ
@given(data=st.data())
def test_any_value_in_a_manifest(folder: Path, data):
    """What is not refused makes a card, and is shown, without an error."""
    written = (folder / MANIFEST).read_text()
    manifest = json.loads(written)
    key = data.draw(st.sampled_from(sorted(manifest)))
    manifest[key] = data.draw(JSON | st.lists(st.just(manifest["scorecard"][0] | {"n": 1}) | JSON, max_size=3))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        found = load(folder)
    except PolicyPatchError as error:
        assert "\n" not in str(error)
    else:
        shown(found.manifest)
        found.manifest.to_json()
    finally:
        (folder / MANIFEST).write_text(written)


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63) + 1, 2**63 - 1)
ROWS = st.fixed_dictionaries(
    {
        "arm": st.sampled_from(["base", "patch", "teacher", ""]),
        "risk": st.sampled_from([COST, "toxicity", "utility", ""]),
        "split": st.sampled_from(["test", "32x1", "x"]),
        "judge": st.none() | st.sampled_from(["svm", "lstm"]),
        "metric": st.sampled_from([*METRICS, "per_token_ratio", "artifact_bytes", "?"]),
        "value": NUMBERS,
        "low": NUMBERS,
        "high": NUMBERS,
        "n": st.integers(-(2**63) + 1, 2**63 - 1),
    },
    optional={"filter": st.booleans(), "unjudged": st.integers(-9, 9)}
    | {key: st.none() | NUMBERS for key in ("delta", "delta_low", "delta_high", "p_value", "upper")},
)


@FUZZ
@given(rows=st.lists(ROWS, max_size=6), upper=st.floats(0, 1e-300) | st.floats(1e300, allow_infinity=False))
def test_any_figures_in_a_scorecard_are_shown(make_patch, rows: list, upper: float):
    edge = make_patch().manifest.scorecard[0] | {"upper": upper}
    for scorecard in (rows, [*rows, edge], [edge]):
        manifest = make_patch(scorecard=scorecard).manifest
        assert shown(Manifest.from_json(manifest.to_json(), "here"))


@pytest.mark.parametrize("upper", [5e-324, 1e-322, 1e-305, 1.7976931348623157e308])
def test_a_bound_at_the_edge_of_floats_is_not_rounded_down(make_patch, upper: float):
    row = make_patch().manifest.scorecard[0] | {"upper": upper}
    said = re.search(r"is below (\S+) on", shown(make_patch(scorecard=[row]).manifest))
    assert said is not None and float(said[1]) >= upper


def test_a_scorecard_of_costs_alone(make_patch):
    row = make_patch().manifest.scorecard[0] | {"risk": COST, "metric": "artifact_bytes"}
    assert "The scorecard is empty." in shown(make_patch(scorecard=[row]).manifest)


@pytest.mark.parametrize("key", ["name", "risks", "base", "parents", "scorecard", "packages", "created", "sha256"])
@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_any_field_nested_to_the_end_of_the_stack(folder: Path, key: str, opened: str):
    manifest = json.loads((folder / MANIFEST).read_text()) | {key: "HERE"}
    deep = opened * 900 + "1" + {"[": "]"}.get(opened, "}") * 900
    (folder / MANIFEST).write_text(json.dumps(manifest).replace('"HERE"', deep))
    refused(folder, f"{key} is nested more than 32 deep")
    (folder / MANIFEST).write_text(deep)
    refused(folder, "nested more than 32 deep|nested too deeply")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("length", "4.0", "length is not valid: 4.0 is not an integer"),
        ("training", '{"lr": 1e400}', "training.lr is not valid: inf is no number"),
        ("training", '{"steps": 1' + "0" * 400 + "}", "training.steps is not valid: it has more than 64 bits"),
        ("risks", '["\\ud800"]', "risks is not valid: it holds half a character"),
        ("training", '{"\\u001b[31m": 1}', "a key below training is no plain text"),
        ("packages", '{"\\u001b[31m": "1"}', "a key below packages is no plain text"),
    ],
)
def test_what_a_schema_lets_through(folder: Path, key: str, value: str, said: str):
    manifest = json.loads((folder / MANIFEST).read_text()) | {key: "HERE"}
    (folder / MANIFEST).write_text(json.dumps(manifest).replace('"HERE"', value))
    with pytest.raises(PolicyPatchError) as caught:
        load(folder)
    assert said in str(caught.value) and str(caught.value).isprintable()


def test_a_link_that_leads_to_itself(folder: Path):
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to(MANIFEST)
    refused(folder, ".")


@FUZZ
@given(header=st.binary(max_size=200) | JSON.map(lambda made: json.dumps(made).encode()), body=st.binary(max_size=100))
def test_any_header_and_body_for_vectors(folder: Path, header: bytes, body: bytes):
    (folder / VECTORS).write_bytes(struct.pack("<Q", len(header)) + header + body)
    refused(folder, ".")


@FUZZ
@given(entry=JSON, more=st.dictionaries(st.text(max_size=8), JSON, max_size=2))
def test_any_tensor_entry(folder: Path, entry, more):
    header = json.dumps({TENSOR: entry} | more).encode()
    (folder / VECTORS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * 5 * 64))
    refused(folder, ".")


@FUZZ
@given(data=JSON)
def test_any_json_for_pefts_settings(make_patch, tmp_path: Path, data):
    target = tmp_path / "peft"
    if not target.exists():
        save_peft(make_patch(), target)
    (target / "adapter_config.json").write_text(json.dumps(data))
    with pytest.raises(PolicyPatchError):
        load_peft(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"scorecard": [{"a": 1}] * 200_000}, "scorecard has 200,000 entries"),
        (lambda m: m | {"risks": ["x"] * 50_000}, "risks has 50,000 entries"),
        (lambda m: m | {"scorecard": [{"a": 1}]}, "scorecard.0"),
        (lambda m: m | {"risks": ["\x1b[2Jtoxicity"]}, "risks.0 is not valid"),
        (lambda m: m | {"name": m["name"] + "\n"}, "name is not valid"),
        (lambda m: m | {"base": m["base"] | {"id": "a\nb"}}, "base.id is not valid"),
    ],
)
def test_a_manifest_that_would_take_long_or_speak_to_a_terminal(folder: Path, change, message: str):
    (folder / MANIFEST).write_text(json.dumps(change(json.loads((folder / MANIFEST).read_text()))))
    start = time.process_time()
    refused(folder, message)
    assert time.process_time() - start < 5


def test_a_link_into_blobs_is_followed_in_a_hub_cache_alone(folder: Path, tmp_path: Path):
    """Wherever a patch is unpacked, two folders above it may hold something called blobs."""
    place, blobs = tmp_path / "downloads" / "vendor" / "patch", tmp_path / "downloads" / "blobs"
    place.parent.mkdir(parents=True), blobs.mkdir()
    folder.rename(place)
    (place / MANIFEST).rename(blobs / MANIFEST)
    (place / MANIFEST).symlink_to(Path("../../blobs") / MANIFEST)
    refused(place, "leads out of its folder")


def below(keys: list[str], inner: object) -> object:
    for key in reversed(keys):
        inner = {key: inner}
    return inner


@pytest.mark.parametrize(
    ("training", "message"),
    [
        # As little as does no harm to who runs this without the limits: ten times both is a hundred times the memory.
        (below(["A" * 20_000], {f"{i}": 0 for i in range(9_000)}), "training has a key of more than 300 characters"),
        (below(["a" * 300] * 30, {f"{i}": 0 for i in range(10_000)}), None),  # what is accepted takes little as well
        (below(["a"], {f"{i}": 0 for i in range(10_001)}), "training has 10,001 entries"),
        ([[0] * 9_999] * 31, "has more than 300,000 entries in all"),
    ],
)
def test_keys_and_entries_that_would_take_memory(folder: Path, training: object, message: str | None):
    manifest = json.loads((folder / MANIFEST).read_text()) | {"training": training}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    tracemalloc.start()
    try:
        if message is None:
            load(folder)
        else:
            refused(folder, message)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_a_message_about_a_key_obeys_no_terminal(folder: Path):
    (folder / MANIFEST).write_text(json.dumps({"\x1b[2J": [0] * 20_000}))
    with pytest.raises(PolicyPatchError, match="has 20,000 entries") as caught:
        load(folder)
    assert str(caught.value).isprintable()


def test_settings_nested_without_end(folder: Path):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"training": below(["a"] * 200, {})}))
    refused(folder, "nested more than 32 deep")
    (folder / MANIFEST).write_text('{"training": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(folder, ".")
