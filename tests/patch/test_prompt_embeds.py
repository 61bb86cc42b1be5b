"""What vLLM reads: base64 of a tensor that torch saved."""

import base64
import io
import runpy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from policypatch.patch.prompt_embeds import CLIENT, EMBEDS, encoded, save_embeds


def decoded(text: str) -> torch.Tensor:
    """As the server does it."""
    return torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)


def test_a_tensor_comes_back(make_patch):
    vectors = make_patch().vectors
    assert torch.equal(decoded(encoded(vectors.requires_grad_())), vectors)
    assert decoded(encoded(torch.ones(4, 8)[:, ::2])).shape == (4, 4)


def test_a_view_does_not_carry_what_it_is_a_view_of(make_patch):
    assert len(encoded(torch.zeros(10_000, 64)[:2])) < 10_000


@pytest.mark.parametrize("by_default", [True, False], ids=["transformers 5", "transformers 4"])
def test_the_client_sends_the_patch_and_the_prompt(
    make_patch, tiny_base, tiny_base_folder, tmp_path: Path, monkeypatch, by_default: bool
):
    """A customer's client may have another transformers than this project: what is returned unasked differs."""
    pytest.importorskip("openai")
    ours = PreTrainedTokenizerBase.apply_chat_template
    monkeypatch.setattr(
        PreTrainedTokenizerBase,
        "apply_chat_template",
        lambda *given, **options: ours(*given, **{"return_dict": by_default} | options),
    )
    folder = save_embeds(make_patch(), tmp_path / "embeds", dtype="float32")
    assert torch.equal(decoded((folder / EMBEDS).read_text()), make_patch().vectors)
    client = runpy.run_path(str(folder / CLIENT), run_name="client")
    sent = decoded(client["embedded"](str(tiny_base_folder), "The harbour was quiet"))
    chat = [{"role": "user", "content": "The harbour was quiet"}]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    ids = tiny_base.tokenizer.apply_chat_template(chat, **options)["input_ids"]
    torch.testing.assert_close(sent, torch.cat([make_patch().vectors, tiny_base.embedding[ids[0]]]))
