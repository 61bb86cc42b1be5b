"""A GGUF file with patches as words of its vocabulary, for llama.cpp and what is built on it.

The file of the base is copied tensor by tensor, so it works for whatever llama.cpp runs, in whatever quantisation; only
the embedding (in float32 then) and the output head have more rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from policypatch.errors import PolicyPatchError
from policypatch.export.words import NONE, Words, with_patches
from policypatch.files.atomic import atomic_path
from policypatch.files.sources import fetch

EMBEDDING, HEAD, TEMPLATE = "token_embd.weight", "output.weight", "tokenizer.chat_template"
ADD_BOS = "tokenizer.ggml.add_bos_token"
CONTROL = 3  # llama.cpp's type of a token that is read as such and not shown


def export_gguf(source: Path, words: Words, out: Path, default: str = NONE, dequantize: bool = False) -> Path:
    """Write a copy of a GGUF file that has the words.

    Args:
        source: the base's file.
        words: of patches for it.
        out: the new file.
        default: the stack that the chat template puts first unless a request says otherwise.
        dequantize: whether every tensor is written in float32: larger and slower, and llama.cpp then computes what
            this package does, without rounding activations as it does for quantised weights.

    Returns:
        `out`.

    Raises:
        PolicyPatchError: the file is none, or has no embedding of the patches' width.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize as plain

    try:
        reader = GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise PolicyPatchError(f"{source} is not a GGUF file: {error}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    width = words.rows.shape[1]
    if EMBEDDING not in tensors or int(tensors[EMBEDDING].shape[0]) != width:
        raise PolicyPatchError(f"{source} has no embedding of width {width}: it is not the base of these patches")
    embedding, head = tensors[EMBEDDING], tensors.get(HEAD, tensors[EMBEDDING])
    old = plain(embedding.data, embedding.tensor_type)
    full = GGMLQuantizationType.F32
    written: list[tuple[str, np.ndarray, Any]] = [
        (EMBEDDING, np.concatenate([old, words.rows.numpy().astype(np.float32)]), full),
        (HEAD, *_head(head.data, full if dequantize else head.tensor_type, head.tensor_type, words)),
    ]
    for tensor in reader.tensors:
        if tensor.name not in (EMBEDDING, HEAD):
            kept = tensor.tensor_type
            change = dequantize and kept != full
            written.append((tensor.name, plain(tensor.data, kept) if change else tensor.data, full if change else kept))
    with atomic_path(out) as temporary:
        writer = GGUFWriter(
            temporary, str(reader.fields["general.architecture"].contents()), endianess=reader.endianess
        )
        writer.data_alignment = reader.alignment
        _fields(reader, writer, words, default, len(old))
        for name, data, kind in written:
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, data, _ in written:
            writer.write_tensor_data(data, tensor_endianess=reader.endianess)
        writer.close()
        _check(temporary, {name: data for name, data, _ in written})
    return out


def _check(path: Path, written: dict[str, np.ndarray]) -> None:
    """Refuse a file that does not read as what was written."""
    from gguf import GGUFReader

    found = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    for name, data in written.items():
        if name not in found or not np.array_equal(
            found[name].view(np.uint8), np.ascontiguousarray(data).view(np.uint8)
        ):
            raise PolicyPatchError(f"{name} does not read as it was written: this file cannot be extended")


def _head(data: np.ndarray, kind: Any, was: Any, words: Words) -> tuple[np.ndarray, Any]:
    """Rows of the output head: the old ones as they are, where the file's own quantisation can write a row."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    row = np.repeat(words.head.numpy().astype(np.float32)[None], len(words.rows), 0)
    if kind == was:
        try:
            return np.concatenate([data, quantize(row, kind).view(data.dtype)]), kind
        except NotImplementedError:  # the package reads more kinds (all of K) than it writes
            kind = GGMLQuantizationType.F32
    return np.concatenate([dequantize(data, was), row]), kind


def _fields(reader: Any, writer: Any, words: Words, default: str, size: int) -> None:
    """Copy the file's settings, the vocabulary with the words."""
    from gguf import GGUFValueType

    templates = 0
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue  # the writer's own
        kind, value = field.types[0], field.contents()
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        if field.name == "tokenizer.ggml.tokens":
            if len(value) != size:
                raise PolicyPatchError(f"the file has {len(value)} tokens and {size} embeddings: it cannot be extended")
            value = [*value, *words.all]
        elif field.name == "tokenizer.ggml.token_type":
            value = [*value, *[CONTROL] * len(words.all)]
        elif field.name == "tokenizer.ggml.scores":
            value = [*value, *[0.0] * len(words.all)]
        elif field.name.endswith(".vocab_size"):
            value = size + len(words.all)
        elif field.name == ADD_BOS and words.bos is not None:
            continue
        elif kind == GGUFValueType.STRING and (field.name == TEMPLATE or field.name.startswith(f"{TEMPLATE}.")):
            value, templates = with_patches(value, words, default), templates + 1
        writer.add_key_value(field.name, value, kind, sub_type=sub)
    if words.bos is not None:  # an engine would put it before the words, and they stand first
        writer.add_bool(ADD_BOS, False)
    if default != NONE and not templates:
        raise PolicyPatchError("the file has no chat template that could put words first: leave out --default")


def gguf_of(config: DictConfig) -> Path:
    """The GGUF file that a base is loaded from, as `conf/model/` describes it.

    Raises:
        PolicyPatchError: the base is not one.
    """
    found = fetch({"path": config.path} if config.path else config.source, "model.source")
    if found.suffix != ".gguf":
        raise PolicyPatchError(f"{config.name} is not a GGUF file: give the one that llama.cpp is to run as --model")
    return found
