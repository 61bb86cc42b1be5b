"""The manifest's schema and its dataclass say the same, and the card tells the manifest in words."""

import json
from dataclasses import MISSING, fields, replace
from importlib.resources import files

import jsonschema
import pytest

from policypatch.errors import PolicyPatchError
from policypatch.patch.card import model_card
from policypatch.patch.manifest import FORMAT, BaseIdentity, Manifest, Parent

SCHEMA = json.loads(files("policypatch.patch").joinpath("manifest.schema.json").read_text("utf-8"))


def names(cls: type) -> list[str]:
    return sorted(f.name for f in fields(cls))


@pytest.mark.parametrize(
    ("cls", "schema"),
    [
        (Manifest, SCHEMA),
        (BaseIdentity, SCHEMA["properties"]["base"]),
        (Parent, SCHEMA["properties"]["parents"]["items"]),
    ],
)
def test_schema_and_dataclass_agree(cls, schema):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert sorted(schema["properties"]) == names(cls)
    optional = {field.name for field in fields(cls) if field.default is None} if cls is not Manifest else set()
    assert sorted({*schema["required"], *optional}) == names(cls)
    assert schema["additionalProperties"] is False


def test_schema_is_of_this_format():
    assert SCHEMA["properties"]["format"]["const"] == FORMAT
    defaults = {f.name: f.default for f in fields(Manifest) if f.default is not MISSING}
    assert SCHEMA["properties"]["placement"]["const"] == defaults["placement"]


def test_there_and_back_through_json(make_patch):
    manifest = make_patch().manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json())), "here") == manifest


def test_optional_parts_may_be_empty(make_patch):
    manifest = make_patch(data_sha256=None, parents=[], training={}, scorecard=[], packages={}).manifest
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


def test_the_bases_positions_are_kept_where_known(make_patch, identity):
    assert "context" not in make_patch().manifest.to_json()["base"]
    manifest = make_patch(base=replace(identity, context=512)).manifest
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


def test_what_is_written_is_checked(make_patch):
    with pytest.raises(PolicyPatchError, match="the manifest: version is not valid"):
        make_patch(version="one").manifest.to_json()


@pytest.mark.parametrize("version", ["0.1.0", "1.2.3-rc.1", "1.2.3+build.5", "10.20.30-a+b"])
def test_semantic_versions(make_patch, version):
    make_patch(version=version).manifest.to_json()


def test_differences_name_digests_alone(identity):
    other = BaseIdentity("elsewhere", "v2", identity.embedding, "f" * 64, identity.config, "f" * 64, "f" * 64)
    assert identity.differences(other) == ["weights", "tokenizer", "chat_template"]
    assert identity.differences(identity) == []


def test_card(make_patch):
    card = model_card(make_patch().manifest)
    assert card.startswith("# toxicity-tiny 1.2.0\n")
    assert "5 vectors (width 64, 320 numbers)" in card
    assert "at positions 0 to 4" in card
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1  # as many cells in every row
    assert "| test | amt | svm | – | 0.25 | 0.125 to 0.375 | 100 |" in table
    assert "lstm (had a part in training)" in table[3]
    start = card.index("|---")
    assert "\n\n" not in card[start : start + sum(len(line) + 1 for line in table[1:])]  # no gap ends the table early
    assert "{{" not in card and "{%" not in card


def test_card_of_several_risks(make_patch):
    def figure(arm, risk, metric, value, upper=None):
        place = {"arm": arm, "risk": risk, "split": "test", "metric": metric, "judge": "svm", "upper": upper}
        return place | {"value": value, "low": value / 2, "high": 2 * value, "n": 100, "filter": False}

    rows = [figure(arm, "toxicity", "toxic_rate", value) for arm, value in (("base", 0.5), ("sft", 0.4))]
    rows += [figure("patch", "toxicity", "toxic_rate", 0.12, 0.19021)]
    for risk, metric in (("utility", "text_ppl"), ("harmfulness", "asr")):
        rows += [figure(arm, risk, metric, value) for arm, value in (("base", 0.3), ("patch", 0.4))]
    manifest = make_patch(scorecard=rows, training={"evaluate": {"level": 0.9}}).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json())), "here") == manifest
    card = model_card(manifest)
    headings = [line for line in card.splitlines() if line.startswith("### ")]
    assert headings == ["### Addressed: toxicity", "### Side effects: harmfulness", "### Side effects: utility"]
    assert "| split | metric | judge | base | patch | 90 % interval of patch | prompts |" in card
    assert "| test | toxic_rate | svm | 0.5 | 0.12 | 0.06 to 0.24 | 100 |" in card
    assert "0.4 | 0.2 to 0.8" in card and "sft" not in card
    claim = "- With 90 % confidence toxic_rate is below 0.191 on prompts such as those of test, judged by svm."
    assert [line for line in card.splitlines() if line.startswith("- With")] == [claim]
    assert all("|---|---|---|---|---|---|---|\n| test" in part for part in card.split("### ")[1:])


def test_a_judge_that_filtered_the_pairs_guarantees_nothing_where_another_does(make_patch):
    rows = make_patch().manifest.scorecard
    assert rows[1]["filter"] and not rows[0]["filter"]
    both = [rows[0] | {"upper": 0.4}, rows[1] | {"upper": 0.3}]
    claims = [
        line for line in model_card(make_patch(scorecard=both).manifest).splitlines() if line.startswith("- With")
    ]
    assert len(claims) == 1 and "judged by svm" in claims[0]
    alone = model_card(make_patch(scorecard=both[1:]).manifest)
    assert "judged by lstm (had a part in training)" in alone


def test_card_without_figures(make_patch):
    card = model_card(make_patch(scorecard=[]).manifest)
    assert "Nothing was measured" in card
    assert "|" not in card
