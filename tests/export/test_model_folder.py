"""The exported folder computes what the base behind the vectors does, and leaves the base as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_run import patch_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from policypatch.errors import PolicyPatchError
from policypatch.export import model_folder
from policypatch.export.model_folder import ABOUT, export_tokens
from policypatch.export.words import Words, words_of
from policypatch.model.backbone import plain_logits
from policypatch.model.base import Base, identify
from policypatch.model.load import load_base

PROMPT, COMPLETION = [5, 6, 7, 20], [8, 9, 4]


def fresh(folder: Path) -> Base:
    """An export changes the base that it is given."""
    options = {"revision": None, "dtype": "float32", "device": "cpu", "attention": "sdpa", "quantize": None}
    return load_base(OmegaConf.create({"name": "tiny", "source": None, "path": str(folder), **options}))


@pytest.fixture(scope="module")
def exported(tiny_base: Base, tiny_base_folder: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    patches = [patch_of(tiny_base, "tox", 10, 3), patch_of(tiny_base, "bias", 20, 2)]
    export_tokens(fresh(tiny_base_folder), patches, out, default="tox", in_text=True)
    return out


@pytest.fixture(scope="module")
def loaded(exported: Path):
    return AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)


@pytest.mark.parametrize("stack", ["none", "tox", "bias", "tox+bias", "bias+tox"])
@torch.no_grad()
def test_a_string_before_the_prompt_is_the_patch(loaded, tiny_base: Base, stack: str):
    model, tokenizer = loaded
    names = [] if stack == "none" else stack.split("+")
    text = "".join(f"<|{name}@1.0.0:{i}|>" for name in names for i in range({"tox": 3, "bias": 2}[name]))
    parts = {"tox": tiny_base.embedding[10:13], "bias": tiny_base.embedding[20:22]}
    front = torch.cat([tiny_base.embedding[:0], *(parts[name] for name in names)])
    before = tokenizer(text, add_special_tokens=False).input_ids if text else []
    ours = model(torch.tensor([[*before, *PROMPT, *COMPLETION]])).logits[0, -4:-1, :300]
    torch.testing.assert_close(ours, plain_logits(tiny_base.model, front, PROMPT, COMPLETION), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_base_within_is_the_base_bit_for_bit(loaded, tiny_base: Base):
    model, _ = loaded
    ids = torch.tensor([PROMPT])
    assert torch.equal(model(ids).logits[..., :300], tiny_base.model(ids).logits)
    assert torch.equal(model.get_input_embeddings().weight[:300], tiny_base.model.get_input_embeddings().weight)


def test_the_words_are_not_written(loaded):
    model, _ = loaded
    assert model.generation_config.suppress_tokens == list(range(300, 305))
    text = model.generate(torch.tensor([PROMPT] * 64), do_sample=True, max_new_tokens=16, pad_token_id=2)
    assert int(text.max()) < 300


def test_a_folder_that_would_write_words_is_refused(
    tiny_base: Base, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """This base's head has no row that silences a word, and so each has some probability; told as never written."""

    def silent(*arguments) -> Words:
        return replace(words_of(*arguments), likeliest=0.0)

    monkeypatch.setattr(model_folder, "words_of", silent)
    with pytest.raises(PolicyPatchError, match=r"would write a word with probability"):
        export_tokens(fresh(tiny_base_folder), [patch_of(tiny_base, "tox", 10)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_and_chats_have_the_default_first_once(loaded, tiny_base: Base):
    _, tokenizer = loaded
    tox, text = [300, 301, 302], "The harbour was quiet"
    assert tokenizer(text).input_ids == tox + tiny_base.encode(text)
    assert tokenizer(text, add_special_tokens=False).input_ids == tiny_base.encode(text)
    chat = [{"role": "user", "content": text}]
    plain = tiny_base.tokenizer.apply_chat_template(chat)["input_ids"]
    assert tokenizer.apply_chat_template(chat)["input_ids"] == tox + plain
    assert tokenizer.apply_chat_template(chat, patch="bias+tox")["input_ids"] == [303, 304, *tox, *plain]
    assert tokenizer.apply_chat_template(chat, patch="none")["input_ids"] == plain
    assert tokenizer.decode([*tox, *tiny_base.encode(text)], skip_special_tokens=True) == text


def test_the_folder_says_what_it_was_made_of(exported: Path, tiny_base: Base):
    about = json.loads((exported / ABOUT).read_text())
    assert (about["base"], about["default"], about["in_text"]) == ("tiny", "tox", True)
    assert [patch["name"] for patch in about["patches"]] == ["tox", "bias"]
    assert about["patches"][1]["words"] == ["<|bias@1.0.0:0|>", "<|bias@1.0.0:1|>"]


def test_a_patch_of_another_base_and_an_unknown_default_write_nothing(
    tiny_base: Base, tiny_base_folder, tmp_path: Path
):
    base = fresh(tiny_base_folder)
    base.model.model.embed_tokens.weight[0] += 1
    other = Base(
        base.model, base.tokenizer, tiny_base.identity.__class__(**{**tiny_base.identity.__dict__, "weights": "0" * 64})
    )
    with pytest.raises(PolicyPatchError, match="differs in weights"):
        export_tokens(other, [patch_of(tiny_base, "tox", 10)], tmp_path / "out")
    with pytest.raises(PolicyPatchError, match="there is no patch 'tux'"):
        export_tokens(fresh(tiny_base_folder), [patch_of(tiny_base, "tox", 10)], tmp_path / "out", default="tux")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [302, 320])
@torch.no_grad()
def test_the_words_take_the_rows_of_a_padded_embedding(
    tiny_base: Base, tiny_base_folder: Path, tmp_path: Path, rows: int
):
    base = fresh(tiny_base_folder)
    base.model.resize_token_embeddings(rows, mean_resizing=False)
    base = _identified(base)
    export_tokens(base, [patch_of(base, "tox", 10, 5)], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == max(rows, 305)
    ours = model(torch.tensor([[300, 301, 302, 303, 304, *PROMPT, *COMPLETION]])).logits[0, -4:-1, :300]
    expected = plain_logits(tiny_base.model, tiny_base.embedding[10:15], PROMPT, COMPLETION)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_every_one_of_several_templates_gets_the_default(tiny_base_folder: Path, tmp_path: Path):
    base = fresh(tiny_base_folder)
    base.tokenizer.chat_template = dict.fromkeys(("default", "tool_use"), base.tokenizer.chat_template)
    base = _identified(base)
    export_tokens(base, [patch_of(base, "tox", 10, 3)], tmp_path / "out", default="tox")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for name in ("default", "tool_use"):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=name)["input_ids"]
        assert ids[:3] == [300, 301, 302]


def test_a_default_that_nothing_would_put_first_is_refused(tiny_base_folder: Path, tmp_path: Path):
    base = fresh(tiny_base_folder)
    base.tokenizer.chat_template = None
    base = _identified(base)
    with pytest.raises(PolicyPatchError, match="no chat template to put words first"):
        export_tokens(base, [patch_of(base, "tox", 10, 3)], tmp_path / "out", default="tox")


def test_what_the_base_suppresses_it_goes_on_to_suppress(tiny_base_folder: Path, tmp_path: Path):
    base = fresh(tiny_base_folder)
    base.model.generation_config.suppress_tokens = [7]
    export_tokens(base, [patch_of(base, "tox", 10, 2)], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.suppress_tokens == [7, 300, 301]


def _identified(base: Base) -> Base:
    """With the identity that it has now."""
    return Base(base.model, base.tokenizer, identify(base.model, base.tokenizer, "changed", "local"))
