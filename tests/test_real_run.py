"""The whole command on the real model, prompts, judges and scorer, at the smallest size that trains anything."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import policypatch
from policypatch.model.base import Base
from policypatch.model.decode import sample
from policypatch.model.form import CHAT
from policypatch.model.load import load_base
from policypatch.model.sampling import Sampling
from policypatch.patch.artifact import Patch, load
from policypatch.patch.peft_layout import save_peft
from policypatch.patch.stacking import stack

ROOT = Path(__file__).parent.parent
SCRIPT = Path(sys.executable).with_name("policypatch")
GREEDY = Sampling(0.0, 1.0, 24)
REQUESTS = ("Name three fruits.", "Who wrote the first dictionary of English?", "My neighbour is loud. What can I do?")
SMALL = [
    "logger=csv",
    "risk.train.limit=30",
    "patch.length=10",
    "sft.steps=2",
    "dpo.steps=2",
    "evaluate.prompts=6",
    "evaluate.other_prompts=3",
    "evaluate.k=2",
    "evaluate.ppl_samples=2",
    "evaluate.resamples=200",
]
OTHERS = {("gender_bias", "gas"), ("gender_bias", "gld"), ("harmfulness", "asr"), ("harmfulness", "over_refusal")}
OTHERS |= {("harmfulness", "benign_refusal"), ("utility", "kl_benign"), ("utility", "text_ppl")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run."""
    folder = tmp_path_factory.mktemp("real") / "run"
    command = [sys.executable, "run.py", *SMALL, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(folder) in done.stdout.replace("\n", "")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_on_the_real_model(folder: Path, tmp_path: Path):
    everything = json.loads((folder / "scorecard.json").read_text())
    assert {(row["risk"], row["metric"]) for row in everything} >= OTHERS
    rows = [row for row in everything if row["risk"] == "toxicity"]
    found = {(row["arm"], row["metric"], row["judge"]) for row in rows}
    for arm in ("base", "sft", "patch"):
        for judge in ("svm", "bilstm"):
            assert {(arm, "amt", judge), (arm, "toxic_rate", judge)} <= found
        assert {(arm, "ppl_mean", "gemma-3-270m"), (arm, "ppl_median", "gemma-3-270m")} <= found
    assert {row["judge"] for row in rows if row["filter"]} == {"bilstm"}

    cfg = OmegaConf.load(ROOT / "conf" / "model" / "smollm2_135m.yaml")
    cfg.dtype = "float32"  # digests do not depend on it, and PEFT's logits can be compared exactly
    base = load_base(cfg)
    patch = load(folder / "patch", base.identity)
    assert patch.vectors.shape == (10, base.width)

    ids = torch.tensor([base.encode("The committee met on Tuesday to")])
    with torch.no_grad():
        tokens = base.model.get_input_embeddings()(ids)
        by_hand = base.model(inputs_embeds=torch.cat([patch.vectors[None], tokens], 1)).logits[:, 10:]
    save_peft(patch, tmp_path / "peft")
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(base.model, tmp_path / "peft")(input_ids=ids).logits[:, 10:]
    assert torch.allclose(by_hand, by_peft, atol=1e-4)


@dataclass(frozen=True)
class Answers:
    """What the base writes greedily: plainly, behind a patch, and behind a stack."""

    base: Base
    patches: dict[str, Patch]
    prompts: list[list[int]]
    rows: dict[str, list[list[list[int]]]]

    @property
    def texts(self) -> dict[str, list[str]]:
        return {name: [self.base.decode(rows[0]) for rows in found] for name, found in self.rows.items()}


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    cfg = OmegaConf.load(ROOT / "conf" / "model" / "smollm2_135m.yaml")
    base, patch = load_base(OmegaConf.merge(cfg, {"dtype": "float32"})), load(folder / "patch")
    patches = {patch.manifest.name: patch, "both": stack([patch, patch], "both")}
    prompts = [base.encode_prompt(request, CHAT) for request in REQUESTS]
    rows = {name: sample(base.model, prompts, p.vectors, 1, GREEDY, eos=base.eos) for name, p in patches.items()}
    rows["none"] = sample(base.model, prompts, None, 1, GREEDY, eos=base.eos)
    return Answers(base, patches, prompts, rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_run_to_engines_that_know_nothing_of_patches(
    folder: Path, answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sign, verify, apply, stack, export, serve, llama.cpp from a GGUF file: the same greedy text everywhere."""
    monkeypatch.chdir(tmp_path)
    command("keygen", "vendor.key")
    command("sign", folder / "patch", "--key", "vendor.key")
    command("verify", folder / "patch", "--key", "vendor.key.pub", "--model", "smollm2_135m")
    command("stack", folder / "patch", folder / "patch", "--out", "both", "--name", "both", "--key", "vendor.key.pub")
    base, prompts, expected, texts = answers.base, answers.prompts, answers.rows, answers.texts
    patch, both = load(folder / "patch"), load("both")
    assert torch.equal(both.vectors, answers.patches["both"].vectors)
    assert texts["none"] != texts["both"]

    policypatch.apply(base.model, folder / "patch", tokenizer=base.tokenizer, require_signature="vendor.key.pub")
    for ids, rows in zip(prompts, expected[patch.manifest.name], strict=True):
        written = base.model.generate(torch.tensor([ids]), max_new_tokens=GREEDY.max_new_tokens, do_sample=False)
        assert [token for token in written[0, len(ids) :].tolist() if token not in base.eos] == rows[0]
    policypatch.remove(base.model)

    command("export", folder / "patch", "--to", "peft", "--out", "peft")
    command("import", "peft", "--out", "again")
    assert torch.equal(load("again").vectors, patch.vectors)

    both_to = (folder / "patch", "both", "--model", "smollm2_135m", "--dtype", "float32")
    command("export", *both_to, "--to", "tokens", "--out", "model", "--default", "both")
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    for name, wanted in texts.items():
        for request, text in zip(REQUESTS, wanted, strict=True):
            chat = [{"role": "user", "content": request}]
            ids = tokenizer.apply_chat_template(chat, patch=name, add_generation_prompt=True, return_tensors="pt")[
                "input_ids"
            ]
            written = model.generate(ids, max_new_tokens=GREEDY.max_new_tokens, do_sample=False)
            assert tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == text

    with served(folder / "patch", "both") as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        for name, wanted in texts.items():
            for request, text in zip(REQUESTS, wanted, strict=True):
                answer = client.chat.completions.create(
                    model="base" if name == "none" else f"base+{name}",
                    messages=[{"role": "user", "content": request}],
                    temperature=0,
                    max_tokens=GREEDY.max_new_tokens,
                )
                assert answer.choices[0].message.content == text
        pieces = client.chat.completions.create(
            model=f"base+{patch.manifest.name}+both",
            messages=[{"role": "user", "content": REQUESTS[0]}],
            temperature=0,
            max_tokens=GREEDY.max_new_tokens,
            stream=True,
        )
        stacked = torch.cat([patch.vectors, both.vectors])
        rows = sample(base.model, prompts[:1], stacked, 1, GREEDY, eos=base.eos)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == base.decode(rows[0][0])

    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make engines")
    command("export", *both_to, "--to", "gguf", "--out", "model.gguf", "--dequantize")
    engine = llama_cpp.Llama("model.gguf", n_ctx=512, logits_all=False, verbose=False, type_k=0, type_v=0)  # 0: float32
    for name, wanted in texts.items():
        of = {patch.manifest.name: patch, "both": both}.get(name)
        words = [] if of is None else [f"<|{name}@{of.manifest.version}:{i}|>" for i in range(len(of.vectors))]
        for ids, text in zip(prompts, wanted, strict=True):
            asked = "".join(words) + base.tokenizer.decode(ids)
            written = engine.create_completion(asked, max_tokens=GREEDY.max_new_tokens, temperature=0)
            assert written["choices"][0]["text"] == text


def command(name: str, *arguments: object) -> None:
    """`policypatch NAME ...`, as a user types it."""
    done = subprocess.run([SCRIPT, name, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@contextmanager
def served(*patches: Path | str) -> Iterator[str]:
    """The address of a server, for as long as the block lasts; it must end in peace."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", "--model", "smollm2_135m", "--dtype", "float32", "--port", str(port)]
    arguments += [part for patch in patches for part in ("--patch", str(patch))]
    server = subprocess.Popen([SCRIPT, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, server.stderr.read()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        assert server.wait(30) in (0, -15)
