"""Vectors as vLLM's `prompt_embeds` takes them: a tensor, saved by torch, in base64."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from torch import Tensor

from policypatch.files.atomic import atomic_folder, write_json, write_text
from policypatch.patch.artifact import MANIFEST, Patch

EMBEDS, CLIENT = "patch.b64", "client.py"

_CLIENT = '''\
"""Ask a vLLM server for what the patched base answers: python client.py BASE "a request" [SERVER]

BASE is the folder or hub id that the server runs, as in `vllm serve BASE --enable-prompt-embeds --dtype {dtype}`.
The prompt is embedded here, behind the patch; the server continues it. Needs torch, transformers and openai.
"""

import base64
import io
import sys
from pathlib import Path

import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer


def embedded(base: str, request: str) -> str:
    """The patch and a chat of one request: (L + T, D), as the server takes it."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    chat = [{{"role": "user", "content": request}}]
    options = {{"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}}  # of transformers 4 and 5
    ids = tokenizer.apply_chat_template(chat, **options)["input_ids"]
    written = base64.b64decode(Path(__file__).with_name("{embeds}").read_text())
    patch = torch.load(io.BytesIO(written), weights_only=True)
    with torch.no_grad():
        whole = torch.cat([patch, model.get_input_embeddings()(ids)[0].float()])
    buffer = io.BytesIO()
    torch.save(whole.to(torch.{dtype}), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    base, request, server = (*sys.argv[1:], "http://localhost:8000/v1")[:3]
    client = OpenAI(base_url=server, api_key="none")
    answer = client.completions.create(
        model=base, prompt="", max_tokens=128, temperature=0, extra_body={{"prompt_embeds": embedded(base, request)}}
    )
    print(answer.choices[0].text)
'''


def encoded(vectors: Tensor) -> str:
    """A tensor (L, D), or the embeddings of a whole prompt behind it, as `prompt_embeds` takes it."""
    buffer = io.BytesIO()
    torch.save(vectors.detach().cpu().clone(), buffer)  # a clone: of a view, torch would save all that it views
    return base64.b64encode(buffer.getvalue()).decode()


def save_embeds(patch: Patch, folder: Path, dtype: str = "bfloat16") -> Path:
    """Write the vectors in base64, a client that puts them before a prompt, and the manifest.

    Args:
        patch: the patch.
        folder: what is written.
        dtype: of the server's model, which the client sends.
    """
    with atomic_folder(folder) as temporary:
        write_text(temporary / EMBEDS, encoded(patch.vectors))
        write_text(temporary / CLIENT, _CLIENT.format(embeds=EMBEDS, dtype=dtype))
        write_json(temporary / MANIFEST, patch.manifest.to_json())
    return folder
