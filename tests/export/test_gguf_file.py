"""A GGUF file gets the words; everything else in it stays as it was, byte for byte."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from policypatch.errors import PolicyPatchError
from policypatch.export.gguf_file import export_gguf
from policypatch.export.words import Words

VOCABULARY, WIDTH = 12, 64
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
Q8, F32, F16 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32, GGMLQuantizationType.F16


def write(
    path: Path,
    kind: GGMLQuantizationType,
    tied: bool,
    template: str | None = TEMPLATE,
    align: int = 32,
    add_bos: bool | None = None,
) -> Path:
    """A base that no engine could run, of the parts that are read."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.vocab_size", VOCABULARY)
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b", "b c"])
    if template is not None:
        writer.add_chat_template(template)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    if align != 32:
        writer.add_custom_alignment(align)
    names = ["token_embd.weight", "blk.0.attn_q.weight", *([] if tied else ["output.weight"])]
    for name in names:
        data = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
        writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def words() -> Words:
    rows = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    head = torch.linspace(-1, 1, WIDTH)
    return Words({"tox": ["<|tox@1.0.0:0|>", "<|tox@1.0.0:1|>"], "bias": ["<|bias@1.0.0:0|>"]}, rows, head, -90.0, 0.0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Q8, F16, F32])
def test_rows_are_added_and_the_rest_is_as_it_was(words: Words, tmp_path: Path, kind, tied: bool):
    source = write(tmp_path / "base.gguf", kind, tied)
    new = GGUFReader(export_gguf(source, words, tmp_path / "out.gguf", default="tox"))
    old = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    tensors = {tensor.name: tensor for tensor in new.tensors}
    embedding, head = tensors["token_embd.weight"], tensors["output.weight"]
    assert embedding.tensor_type == F32
    before = old["token_embd.weight"]
    assert np.array_equal(embedding.data[:VOCABULARY], dequantize(before.data, before.tensor_type))
    assert np.array_equal(embedding.data[VOCABULARY:], words.rows.numpy())
    assert head.tensor_type == kind
    assert np.array_equal(head.data[:VOCABULARY], old["token_embd.weight" if tied else "output.weight"].data)
    row = dequantize(head.data[VOCABULARY:], kind)
    assert np.allclose(row, words.head.numpy(), atol=0.01) and len(row) == 3
    for name in ("blk.0.attn_q.weight", "output_norm.weight"):
        assert tensors[name].tensor_type == old[name].tensor_type
        assert np.array_equal(tensors[name].data, old[name].data)


@pytest.mark.parametrize("said", [True, None])
def test_where_a_base_puts_bos_before_a_text_the_file_does_not(words: Words, tmp_path: Path, said: bool | None):
    """Words stand first, so whoever writes them writes BOS behind them."""
    source = write(tmp_path / "base.gguf", Q8, True, add_bos=said)
    out = export_gguf(source, replace(words, bos="<s>"), tmp_path / "out.gguf")
    assert GGUFReader(out).fields["tokenizer.ggml.add_bos_token"].contents() is False
    kept = GGUFReader(export_gguf(source, words, tmp_path / "kept.gguf")).fields.get("tokenizer.ggml.add_bos_token")
    assert (None if kept is None else kept.contents()) is said


def test_the_vocabulary_and_the_template_know_the_words(words: Words, tmp_path: Path):
    out = export_gguf(write(tmp_path / "base.gguf", Q8, True), words, tmp_path / "out.gguf", default="tox")
    fields = GGUFReader(out).fields
    assert fields["tokenizer.ggml.tokens"].contents()[VOCABULARY:] == words.all
    assert fields["tokenizer.ggml.token_type"].contents() == [1] * VOCABULARY + [3] * 3
    assert fields["llama.vocab_size"].contents() == VOCABULARY + 3
    assert fields["tokenizer.ggml.merges"].contents() == ["a b", "b c"]
    template = fields["tokenizer.chat_template"].contents()
    assert template.endswith(TEMPLATE) and '"tox": "<|tox@1.0.0:0|><|tox@1.0.0:1|>"' in template


def test_dequantized_everything_is_float32_of_the_same_value(words: Words, tmp_path: Path):
    source = write(tmp_path / "base.gguf", Q8, False)
    old = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    for tensor in GGUFReader(export_gguf(source, words, tmp_path / "out.gguf", dequantize=True)).tensors:
        before = old[tensor.name]
        assert tensor.tensor_type == F32
        assert np.array_equal(tensor.data[: len(before.data)], dequantize(before.data, before.tensor_type))


def test_what_is_not_the_base_is_refused(words: Words, tmp_path: Path):
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(PolicyPatchError, match="is not a GGUF file"):
        export_gguf(tmp_path / "text.gguf", words, tmp_path / "out.gguf")
    other = Words(words.of, torch.zeros(3, 32), torch.zeros(32), 0.0, 0.0)
    with pytest.raises(PolicyPatchError, match="no embedding of width 32"):
        export_gguf(write(tmp_path / "base.gguf", Q8, True), other, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_with_an_alignment_of_its_own_keeps_it(words: Words, tmp_path: Path):
    source = write(tmp_path / "base.gguf", Q8, True, align=128)
    new = GGUFReader(export_gguf(source, words, tmp_path / "out.gguf"))
    assert new.alignment == 128
    old = {tensor.name: tensor.data for tensor in GGUFReader(source).tensors}
    found = {tensor.name: tensor.data for tensor in new.tensors}
    assert np.array_equal(found["blk.0.attn_q.weight"], old["blk.0.attn_q.weight"])


def test_a_default_needs_a_template(words: Words, tmp_path: Path):
    source = write(tmp_path / "base.gguf", Q8, True, template=None)
    assert export_gguf(source, words, tmp_path / "plain.gguf").is_file()
    with pytest.raises(PolicyPatchError, match="no chat template"):
        export_gguf(source, words, tmp_path / "out.gguf", default="tox")
    assert not (tmp_path / "out.gguf").exists()
