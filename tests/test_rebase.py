"""A patch carried to another base: the map, and the command for a fine-tuned base and for one of another width."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import overrides, patch_of
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.commands.base import risk_overrides
from policypatch.commands.rebase import _best, _say
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.measure import Settings
from policypatch.model.base import Base
from policypatch.patch.artifact import load, save
from policypatch.patch.lineage import derived
from policypatch.patch.stacking import stack
from policypatch.rebase import carried, fitted, shared_tokens

SPEAKING = ("toxic_rate", "svm")


def test_a_linear_relation_is_found_whatever_the_widths():
    random = torch.Generator().manual_seed(0)
    old, turn = torch.randn(200, 8, generator=random), torch.randn(8, 5, generator=random)
    torch.testing.assert_close(fitted(old, old @ turn).float(), turn, rtol=1e-3, atol=1e-3)


def with_embedding(base: Base, weight: torch.Tensor) -> Base:
    """A base that says its embeddings are these."""

    class Embedding:
        embed_scale = None

    embedding = Embedding()
    embedding.weight = weight

    class Model:
        def get_input_embeddings(self):
            return embedding

    return replace(base, model=Model())


def test_vectors_go_where_the_map_of_shared_tokens_takes_them(tiny_base: Base):
    """A base whose embeddings are turned: an embedding of the old one becomes that token's of the new one."""
    weight = tiny_base.embedding.float()
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]
    new = with_embedding(tiny_base, weight @ turn)
    over = carried(weight[4:8], tiny_base, new)
    assert over.shared == 300 and over.explained > 0.99
    torch.testing.assert_close(over.vectors, (weight @ turn)[4:8], rtol=1e-2, atol=1e-2)


def test_a_map_that_explains_nothing_says_so(tiny_base: Base):
    random = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    assert carried(tiny_base.embedding[4:8].float(), tiny_base, with_embedding(tiny_base, random)).explained < 0.1


def test_bases_that_share_no_token_are_refused(tiny_base: Base):
    class Other:
        def get_vocab(self):
            return {"none of them": 3}

    with pytest.raises(PolicyPatchError, match="share no token"):
        shared_tokens(tiny_base, replace(tiny_base, tokenizer=Other()))


@pytest.fixture
def rebase(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """rebase(new base's folder, *options): of the patch in tmp_path / "tox"."""
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    left = ("model.", "patch.", "risk=", "others=", "logger", "trainer=", "evaluate.costs")
    settings = [o for o in overrides(tiny_base_folder, tmp_path) if not o.startswith(left)]
    settings += ["others=none", "model.dtype=float32", "trainer.validate_every=2"]

    def call(new: Path, *options: object):
        chosen = [word for setting in settings for word in ("--set", setting)]
        given = ["rebase", str(tmp_path / "tox"), "--from", str(tiny_base_folder), "--to", str(new), *map(str, options)]
        return CliRunner().invoke(app, [*given, *chosen], env={"COLUMNS": "100"})

    return call


def of_another_width(folder: Path, tiny_base_folder: Path) -> Path:
    shutil.copytree(tiny_base_folder, folder)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def fine_tuned(folder: Path, tiny_base_folder: Path) -> Path:
    shutil.copytree(tiny_base_folder, folder)
    model = LlamaForCausalLM.from_pretrained(tiny_base_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01 * parameter.std())
    model.save_pretrained(folder)
    return folder


def test_to_a_fine_tuned_base_in_all_three_ways(rebase, tiny_base: Base, tiny_base_folder: Path, tmp_path: Path):
    given = save(patch_of(tiny_base, "tox", 4), tmp_path / "tox")
    result = rebase(fine_tuned(tmp_path / "new", tiny_base_folder), "--out", tmp_path / "carried", "--share", 0.5)
    assert result.exit_code == 0, result.output
    for way in ("as it stands", "mapped", "tuned"):
        assert f"toxic_rate by svm, {way}: " in result.stdout
    assert "300 tokens in common" in result.stdout and "toxic_rate by svm, on its own base: " in result.stdout
    made = load(tmp_path / "carried")
    assert made.manifest.base != tiny_base.identity and made.manifest.name == "tox"
    assert [parent.sha256 for parent in made.manifest.parents] == [load(given).manifest.sha256]
    told = made.manifest.training["rebase"]
    assert told["kept"] in ("as it stands", "mapped", "tuned") and told["from"]["weights"] == tiny_base.identity.weights
    (work,) = (tmp_path / "outputs" / "rebase").iterdir()
    chosen_by, reported = (
        json.loads((work / name / "scorecard.json").read_text()) for name in ("choosing", "reported")
    )
    values = [
        {row["arm"]: row for row in rows if (row["metric"], row["judge"]) == SPEAKING} for rows in (chosen_by, reported)
    ]
    ways = [arm for arm in values[0] if arm != "base"]
    assert values[0][told["kept"]]["value"] == min(values[0][way]["value"] for way in ways)
    assert [of["base"]["n"] for of in values] == [4, 4]  # of 8: either half
    figures = {row["arm"]: row for row in made.manifest.scorecard if (row["metric"], row["judge"]) == SPEAKING}
    assert figures == values[1]
    base, best = (figures[arm]["value"] for arm in ("base", told["kept"]))
    assert f"toxic_rate by svm, {told['kept']}: {base:.3g} -> {best:.3g} *" in result.stdout
    (figure,) = told["figures"]
    assert (figure["risk"], figure["metric"], set(figure["ways"])) == ("toxicity", "toxic_rate", set(ways))


def test_the_share_that_a_way_keeps_is_told_for_every_risk(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Of toxicity 8 of 10 prompts were taken away on the own base, and 6 on the new one: 75 %; of ASR 4 and all 4."""
    places = {"toxicity": ("toxic_rate", (10, 2), (10, 4)), "harmfulness": ("asr", (8, 4), (6, 2))}

    def lines(which: int, name: str, field: str) -> list[dict]:
        found = []
        for risk, of in places.items():
            for arm, count in zip(("base", name), of[1:][which], strict=True):
                value = count / 10 if field == "value" else [1.0] * count + [0.0] * (10 - count)
                place = {"risk": risk, "split": "s", "metric": of[0], "judge": "j"}
                found.append(place | {"arm": arm, field: value})
        return found

    for which, folder, name in ((0, "own_base", "own_base"), (1, "reported", "tuned")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "per_prompt.json").write_text(json.dumps(lines(which, name, "values")))
    before, card = lines(0, "own_base", "value"), lines(1, "tuned", "value")
    found = _say(card, before, ["tuned"], "tuned", list(places), tmp_path, Settings())
    assert [of["risk"] for of in found] == list(places)
    assert [of["ways"]["tuned"]["kept"]["share"] for of in found] == pytest.approx([0.75, 1.0])
    assert found[0]["on_its_own_base"] == [1.0, 0.2] and found[0]["ways"]["tuned"]["kept"]["low"] < 0.75
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "toxic_rate by j, tuned: 1 -> 0.4 *: keeps 75% [" in told
        and "asr by j, tuned: 0.6 -> 0.2 *: keeps 100%" in told
    )


def test_to_a_base_of_another_width(rebase, tiny_base: Base, tiny_base_folder: Path, tmp_path: Path):
    save(patch_of(tiny_base, "tox", 4), tmp_path / "tox")
    new = of_another_width(tmp_path / "narrow", tiny_base_folder)
    result = rebase(new, "--out", tmp_path / "carried", "--share", 0)
    assert result.exit_code == 0, result.output
    made = load(tmp_path / "carried")
    assert made.vectors.shape == (4, 32) and made.manifest.width == 32
    assert "as it stands" not in result.stdout and "tuned" not in result.stdout


def test_what_cannot_be_carried_is_told(rebase, tiny_base: Base, tiny_base_folder: Path, tmp_path: Path):
    other = replace(tiny_base.identity, weights="0" * 64)
    save(patch_of(tiny_base, "tox", 4, base=other), tmp_path / "tox")
    told = rebase(tiny_base_folder, "--out", tmp_path / "carried")
    assert told.exit_code == 2 and "differs in weights" in told.stderr
    shutil.rmtree(tmp_path / "tox")
    save(patch_of(tiny_base, "tox", 4), tmp_path / "tox")
    same = rebase(tiny_base_folder, "--out", tmp_path / "carried")
    assert same.exit_code == 2 and "there is nothing to carry" in same.stderr and same.stderr.count("\n") == 1
    wrong = rebase(tiny_base_folder, "--out", tmp_path / "carried", "--share", 2)
    assert wrong.exit_code == 2 and "--share is 2" in wrong.stderr


def test_a_patch_that_is_carried_as_it_stands_to_the_same_weights_is_no_parent_of_itself(tiny_base: Base):
    """A base with another template: the patch is bound anew, and stacks as before."""
    given = patch_of(tiny_base, "tox", 4)
    told_otherwise = replace(tiny_base.identity, chat_template="1" * 64)
    made = derived(given, given.vectors, base=told_otherwise)
    assert made.manifest.base == told_otherwise and made.manifest.parents == []
    stack([made, derived(patch_of(tiny_base, "safe", 20), given.vectors + 1, base=told_otherwise)])
    other = derived(given, given.vectors, base=replace(tiny_base.identity, weights="2" * 64))
    assert [parent.sha256 for parent in other.manifest.parents] == [given.manifest.sha256]


def test_a_patch_against_several_risks_is_tuned_on_all_of_them():
    assert risk_overrides(["toxicity", "harmfulness"]) == ["risk=[toxicity,harmfulness]"]
    assert risk_overrides(["own", "toxicity"]) == ["risk=toxicity"]


def test_the_best_way_is_the_best_over_all_risks():
    """0.5 and 0.5 of the base's beat 0.4 and 0.8, though the first risk alone would have it the other way."""
    rows = []
    for arm, tox, asr in (("base", 0.4, 1.0), ("as it stands", 0.16, 0.8), ("tuned", 0.2, 0.5)):
        for risk, metric, value in (("toxicity", "toxic_rate", tox), ("harmfulness", "asr", asr)):
            rows.append({"arm": arm, "risk": risk, "split": "s", "judge": "j", "metric": metric, "value": value})
    assert _best(rows, ["as it stands", "tuned"], ["toxicity", "harmfulness"]) == "tuned"
    assert _best(rows, ["as it stands", "tuned"], ["toxicity"]) == "as it stands"
