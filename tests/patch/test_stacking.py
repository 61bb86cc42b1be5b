"""Stacks: vectors in order, lineage, and that a stack is what its parts are one before the other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.errors import PolicyPatchError
from policypatch.model.decode import sample
from policypatch.model.sampling import Sampling
from policypatch.patch.artifact import Patch, digest, load, save
from policypatch.patch.card import model_card
from policypatch.patch.lineage import derived
from policypatch.patch.manifest import Parent
from policypatch.patch.stacking import stack


@pytest.fixture
def pair(make_patch):
    a = make_patch(torch.full((2, 64), 0.1), name="tox", version="1.2.0")
    return a, make_patch(torch.full((3, 64), 0.2), name="bias", risks=["gender_bias", "toxicity"])


def test_vectors_stand_in_the_order_given(pair):
    a, b = pair
    made = a + b
    assert torch.equal(made.vectors, torch.cat([a.vectors, b.vectors]))
    assert (made.manifest.length, made.manifest.width, made.manifest.name) == (5, 64, "tox_bias")
    assert torch.equal((b + a).vectors, torch.cat([b.vectors, a.vectors]))
    assert (b + a).manifest.sha256 != made.manifest.sha256


def test_the_manifest_names_parents_and_risks_and_claims_no_figures(pair):
    a, b = pair
    manifest = stack([a, b], "both", "2.0.0").manifest
    assert [(p.name, p.version, p.sha256) for p in manifest.parents] == [
        ("tox", "1.2.0", a.manifest.sha256),
        ("bias", "1.2.0", b.manifest.sha256),
    ]
    assert manifest.risks == ["toxicity", "gender_bias"]
    assert (manifest.name, manifest.version, manifest.scorecard, manifest.data_sha256) == ("both", "2.0.0", [], None)
    assert "Nothing was measured for this patch." in model_card(manifest)


def test_a_stack_of_stacks_is_the_stack_of_all(pair, make_patch):
    a, b = pair
    c = make_patch(torch.full((1, 64), 0.3), name="harm")
    assert torch.equal(((a + b) + c).vectors, stack([a, b, c]).vectors)
    assert torch.equal((a + (b + c)).vectors, stack([a, b, c]).vectors)
    assert [p.name for p in ((a + b) + c).manifest.parents] == ["tox_bias", "harm"]


def test_a_stack_is_its_parts_one_before_the_other(tiny_llama, pair):
    """Greedy text behind the stack, and behind the second part with the first one's vectors before it by hand."""
    a, b = pair
    prompts, greedy = [[5, 6, 7], [8, 9, 10, 11]], Sampling(temperature=0.0, max_new_tokens=8)
    by_hand = torch.cat([a.vectors, b.vectors])
    assert sample(tiny_llama, prompts, (a + b).vectors, sampling=greedy) == sample(
        tiny_llama, prompts, by_hand, sampling=greedy
    )
    embedded = torch.cat([a.vectors, b.vectors, tiny_llama.get_input_embeddings()(torch.tensor(prompts[0]))])[None]
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    theirs = tiny_llama.generate(inputs_embeds=embedded, **options)[0].tolist()
    assert sample(tiny_llama, prompts[:1], (a + b).vectors, sampling=greedy)[0][0] == theirs


def test_what_does_not_stack_is_refused(pair, identity, make_patch):
    a, b = pair
    other = make_patch(name="far", base=replace(identity, id="another", tokenizer="9" * 64))
    for patches, options, message in (
        ([a], {}, "two patches or more, not 1"),
        ([a, other], {}, "made for tiny and far for another, which differ in tokenizer"),
        ([a, b], {"context": 5}, "5 vectors and tiny a context of 5"),
        ([a, b], {"name": "No Good"}, "name is not valid"),
        ([a, b], {"version": "two"}, "version is not valid"),
    ):
        with pytest.raises(PolicyPatchError, match=message) as caught:
            stack(patches, **options)
        assert "\n" not in str(caught.value)
    assert len(stack([a, b], context=6).vectors) == 5
    narrow, wide = (
        replace(b, manifest=replace(b.manifest, base=replace(b.manifest.base, context=context))) for context in (5, 9)
    )
    with pytest.raises(PolicyPatchError, match="5 vectors and tiny a context of 5"):
        stack([a, narrow])  # the part that knows it need not be the first
    assert stack([a, wide]).manifest.base.context == 9


def test_the_command(pair, tmp_path: Path):
    folders = [save(patch, tmp_path / patch.manifest.name) for patch in pair]
    call = ["stack", *map(str, folders), "--out", str(tmp_path / "both")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0 and "2 + 3 = 5 vectors, not measured yet" in result.stdout.replace("\n", " ")
    assert torch.equal(load(tmp_path / "both").vectors, (pair[0] + pair[1]).vectors)
    again = CliRunner().invoke(app, call)
    assert again.exit_code == 2 and "exists: choose another --out" in again.stderr


def test_a_patch_that_is_among_its_own_parents_is_refused(pair):
    a, b = pair
    of_itself = Patch(a.vectors, replace(a.manifest, parents=[Parent("tox", "1.2.0", a.manifest.sha256)]))
    with pytest.raises(PolicyPatchError, match="tox is among its own parents"):
        stack([of_itself, b])
    first = Patch(a.vectors, replace(a.manifest, parents=[Parent("bias", "1.2.0", b.manifest.sha256)]))
    second = Patch(b.vectors, replace(b.manifest, parents=[Parent("tox", "1.2.0", a.manifest.sha256)]))
    with pytest.raises(PolicyPatchError, match="tox is among its own parents"):
        stack([first, second])
    stack([first, b])  # a patch and what it came from may stand together
    elsewhere = Parent("tox", "1.2.0", a.manifest.sha256, "f" * 64)  # the same vectors, carried over from another base
    stack([Patch(a.vectors, replace(a.manifest, parents=[elsewhere])), b])


def test_a_patch_alone_is_no_child_of_its_own(pair):
    made = stack(pair[:1], "chosen", alone=True)
    assert made.manifest.sha256 == pair[0].manifest.sha256 and made.manifest.parents == pair[0].manifest.parents
    stack([made, pair[1]])


def test_a_patch_made_of_another_does_not_claim_its_training_data_or_figures(pair):
    parent = Patch(pair[0].vectors, replace(pair[0].manifest, data_sha256="0" * 64, scorecard=[{"a": 1}]))
    made = derived(parent, parent.vectors[:1], name="short", training={"squash": {}})
    manifest = made.manifest
    assert (manifest.name, manifest.length, manifest.data_sha256, manifest.scorecard) == ("short", 1, None, [])
    assert manifest.training == {"squash": {}} and manifest.parents == [parent.manifest.as_parent]
    assert manifest.base == parent.manifest.base and manifest.sha256 == digest(made.vectors)
    assert set(manifest.packages) == {"policypatch", "torch"}
