"""`import policypatch`: patches by folder on a customer's model, refused where they are for another one."""

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tiny_run import patch_of
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import policypatch
from policypatch.errors import PolicyPatchError
from policypatch.model.base import Base
from policypatch.patch.artifact import Patch, digest, save, sign
from policypatch.patch.signature import keygen


@pytest.fixture
def customer(tiny_base_folder: Path):
    """A model and tokenizer as plain transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(tiny_base_folder)


@pytest.fixture
def made(tiny_base: Base, tmp_path: Path):
    """made(name, start) -> a patch for the tiny base, of four of its own embeddings, and its folder."""

    def make(name: str, start: int, **changes) -> tuple[Patch, Path]:
        patch = patch_of(tiny_base, name, start, **changes)
        return patch, save(patch, tmp_path / name)

    return make


def continued(model, tokenizer, text: str) -> str:
    encoded = tokenizer(text, return_tensors="pt")
    return tokenizer.decode(model.generate(**encoded, max_new_tokens=6, do_sample=False)[0])


def test_applied_by_folder_switched_and_removed(customer, made):
    (tox, tox_folder), (bias, _) = made("tox", 10), made("bias", 30)
    model, tokenizer = customer
    plain = continued(model, tokenizer, "The harbour")
    assert policypatch.apply(model, str(tox_folder), bias, tokenizer=tokenizer) is model
    both = continued(model, tokenizer, "The harbour")
    with policypatch.using(model, None):
        assert continued(model, tokenizer, "The harbour") == plain
    with policypatch.using(model, [tox, bias]):
        assert continued(model, tokenizer, "The harbour") == both
    with policypatch.using(model, tox + bias):
        assert continued(model, tokenizer, "The harbour") == both
    policypatch.remove(model)
    assert continued(model, tokenizer, "The harbour") == plain != both


def test_a_stack_for_each_row(customer, made):
    tox, folder = made("tox", 10)
    model, tokenizer = customer
    text = "The train arrived"
    plain = continued(model, tokenizer, text)
    policypatch.apply(model, tox)
    patched = continued(model, tokenizer, text)
    encoded = tokenizer([text, text], return_tensors="pt")
    with policypatch.using(model, [folder, None], per_row=True):
        out = model.generate(**encoded, max_new_tokens=6, do_sample=False)
    assert [tokenizer.decode(row) for row in out] == [patched, plain]
    with policypatch.using(model, [tox, None, policypatch.load(folder)]):  # None says that these are rows
        out = model.generate(**tokenizer([text] * 3, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert [tokenizer.decode(row) for row in out] == [patched, plain, patched]
    with policypatch.using(model, [None]):
        assert continued(model, tokenizer, text) == plain


def test_vectors_that_no_training_makes_are_told_when_they_are_switched_to(customer, made, tiny_base: Base):
    tox, _ = made("tox", 10)
    model, _ = customer
    policypatch.apply(model, tox)
    odd = patch_of(tiny_base, "odd", 4)
    vectors = odd.vectors * 100
    odd = Patch(vectors, replace(odd.manifest, sha256=digest(vectors)))
    with pytest.warns(UserWarning, match="odd 1.0.0: .* far longer"), policypatch.using(model, odd):
        pass


def test_a_prompt_that_leaves_no_room_is_refused(customer, made):
    tox, _ = made("tox", 10)
    model, _ = customer
    policypatch.apply(model, tox)
    ids = torch.full((1, model.config.max_position_embeddings - tox.manifest.length + 1), 5)
    with pytest.raises(PolicyPatchError, match="exceed the model's context of 512"):
        model(input_ids=ids)
    assert model(input_ids=ids[:, 1:]).logits.shape[1] == ids.shape[1] - 1


def test_what_a_program_needs_is_there():
    assert policypatch.Patch and policypatch.save and issubclass(policypatch.PolicyPatchError, Exception)
    assert policypatch.__version__ == version("policypatch")


def test_a_pipeline_and_a_chat(customer, made):
    tox, _ = made("tox", 10)
    model, tokenizer = customer
    chat = [{"role": "user", "content": "Who voted?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    policypatch.apply(model, tox, tokenizer=tokenizer)
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**encoded, max_new_tokens=6, do_sample=False)[0, encoded["input_ids"].shape[1] :]
    said = pipeline("text-generation", model=model, tokenizer=tokenizer)(chat, max_new_tokens=6, do_sample=False)
    assert said[0]["generated_text"][-1]["content"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_another_base_is_refused_with_what_differs(customer, made, tiny_base: Base):
    from dataclasses import replace

    model, tokenizer = customer
    far, _ = made("far", 10, base=replace(tiny_base.identity, weights="0" * 64, chat_template="1" * 64))
    with pytest.raises(PolicyPatchError, match=r"far 1\.0\.0 was made for tiny .*differs in weights, chat_template:"):
        policypatch.apply(model, far, tokenizer=tokenizer)
    with pytest.raises(PolicyPatchError, match="differs in weights: use the base"):
        policypatch.apply(model, far)  # nothing is known of a tokenizer that was not given
    with pytest.raises(PolicyPatchError, match="allow_mismatch names weight: choose from"):
        policypatch.apply(model, far, allow_mismatch=["weight"])
    policypatch.apply(model, far, tokenizer=tokenizer, allow_mismatch=["weights", "chat_template"])
    with policypatch.using(model, [far]):  # what was accepted stays so
        pass
    other, _ = made("other", 10, base=replace(tiny_base.identity, embedding="2" * 64))
    with pytest.raises(PolicyPatchError, match="differs in embedding"), policypatch.using(model, other):
        pass


def test_switching_does_not_look_at_the_whole_model_again(customer, made, monkeypatch):
    (tox, _), (bias, _) = made("tox", 10), made("bias", 30)
    policypatch.apply(customer[0], tox)
    monkeypatch.setattr("policypatch.api.identify", lambda *_: pytest.fail("identified again"))
    with policypatch.using(customer[0], bias):
        pass


def test_a_signature_may_be_asked_for(customer, made, tmp_path: Path):
    _, folder = made("tox", 10)
    private, public = keygen(tmp_path / "key")
    with pytest.raises(PolicyPatchError, match="is not signed"):
        policypatch.apply(customer[0], folder, require_signature=public)
    sign(folder, private)
    policypatch.apply(customer[0], folder, require_signature=public)
    loaded = policypatch.load(folder)
    with pytest.raises(PolicyPatchError, match="give its folder"):  # what is loaded has no signature with it
        policypatch.apply(customer[0], loaded, require_signature=public)
    _, unsigned = made("bias", 30)
    with pytest.raises(PolicyPatchError, match="is not signed"), policypatch.using(customer[0], unsigned):
        pass
    with policypatch.using(customer[0], folder):
        pass


def test_nothing_heavy_is_imported_before_it_is_asked_for():
    code = (
        "import sys, policypatch; assert 'torch' not in sys.modules; policypatch.apply; assert 'torch' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = policypatch.nothing


def test_vectors_that_no_training_makes_are_told(customer, tiny_base: Base):
    vectors = tiny_base.embedding[10:14].float() * 100
    odd = patch_of(tiny_base, "odd", 10, sha256=digest(vectors))
    model, tokenizer = customer
    with pytest.warns(UserWarning, match=r"odd 1\.0\.0: 4 of 4 vectors are far longer"):
        policypatch.apply(model, Patch(vectors, odd.manifest), tokenizer=tokenizer)
