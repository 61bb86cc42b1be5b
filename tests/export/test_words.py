"""Words: names, rows of the head that keep them unwritten, chat templates."""

from dataclasses import replace

import pytest
import torch
from tiny_run import patch_of
from transformers import PreTrainedTokenizerFast

from policypatch.errors import PolicyPatchError
from policypatch.export.words import Words, silent_row, with_patches, words_of


@pytest.fixture(scope="module")
def words(tiny_base) -> Words:
    return words_of(tiny_base, [patch_of(tiny_base, "tox", 10, 3), patch_of(tiny_base, "bias", 20, 2)])


def test_every_vector_is_a_word_of_its_own(words: Words, tiny_base):
    assert words.of["bias"] == ["<|bias@1.0.0:0|>", "<|bias@1.0.0:1|>"]
    assert words.text("bias+tox") == "".join(words.of["bias"] + words.of["tox"])
    assert words.text("none") == ""
    assert torch.equal(words.rows, tiny_base.embedding[[10, 11, 12, 20, 21]].float())


@pytest.mark.parametrize("stack", ["tux", "tox+tux", "tox+", ""])
def test_an_unknown_name_is_refused(words: Words, stack: str):
    with pytest.raises(PolicyPatchError, match="choose from tox, bias, none"):
        words.text(stack)


@pytest.mark.parametrize(("names", "said"), [([], "no patch"), (["tox", "tox"], "two patches"), (["none"], "rename")])
def test_names_that_words_cannot_have(tiny_base, names: list[str], said: str):
    with pytest.raises(PolicyPatchError, match=said):
        words_of(tiny_base, [patch_of(tiny_base, name, 10, 3) for name in names])


def chat(template: str, tokenizer: PreTrainedTokenizerFast, **given) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], chat_template=template, tokenize=False, **given
    )


@pytest.mark.parametrize("default", ["none", "tox", "tox+bias"])
@pytest.mark.parametrize("asked", ["none", "bias", "bias+tox", None, False, ""])
def test_the_template_puts_first_what_is_asked_for(words: Words, tiny_tokenizer, default: str, asked):
    given = {} if asked is None else {"patch": asked}
    text = chat(with_patches(tiny_tokenizer.chat_template, words, default), tiny_tokenizer, **given)
    expected = words.text(default if asked is None else asked or "none")
    assert text == expected + chat(tiny_tokenizer.chat_template, tiny_tokenizer)


def test_the_template_refuses_an_unknown_name(words: Words, tiny_tokenizer):
    with pytest.raises(Exception, match="there is no patch tux"):
        chat(with_patches(tiny_tokenizer.chat_template, words, "none"), tiny_tokenizer, patch="tox+tux")


def test_where_states_have_a_direction_in_common_a_words_row_stays_far_below(tiny_base, tiny_llama):
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight += 3  # every state starts with this, and norms keep it
    row, highest, likeliest = silent_row(replace(tiny_base, model=tiny_llama), [torch.ones(2, 64)], 50)
    assert row.shape == (64,) and row.any()
    assert highest < -20 and likeliest < 1e-12


def test_where_they_have_none_it_is_zero_and_that_is_told(words: Words):
    """The tiny base is random: nothing is common to its states."""
    assert not words.head.any() and words.highest == 0
    assert 1e-4 < words.likeliest < 1


@pytest.mark.parametrize("start", ["\n", "  {% set x = 1 %}\n", "{# a #}\n\n", " a"])
def test_a_template_goes_on_as_before_however_it_begins(words: Words, tiny_tokenizer, start: str):
    template = start + tiny_tokenizer.chat_template
    ours = chat(with_patches(template, words, "none"), tiny_tokenizer, patch="bias")
    assert ours == words.text("bias") + chat(template, tiny_tokenizer)
