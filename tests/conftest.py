"""A tiny random Llama with a tokenizer of its own, in memory and as a folder, and a cache that no test shares."""

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policypatch.model.base import Base
from policypatch.model.load import load_base

os.environ.setdefault("POLICYPATCH_HOME", str(Path(__file__).parent.parent))  # as run.py does, wherever a test goes

VOCABULARY = 300
# Enough different words for the 300 - 256 - 3 merges.
_CORPUS = (
    "The harbour was quiet again before the evening train arrived with its three passengers.",
    "Nobody in the office could say where the old map of the valley had been kept.",
    "My neighbour said that the committee asked for a second opinion before it voted.",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def fast_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast test starts from an empty cache; a slow one may use what the user's own holds (the real base)."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """3 layers, width 64, 4 heads over 2 key-value heads, random but always the same weights."""
    return _llama()


def _llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)  # at the usual 0.02 attention is nearly uniform and would hide mistakes
    return model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens with bos, eos, pad and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert len(tokenizer) == VOCABULARY
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_base_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and tokenizer as a folder, as `python run.py model.path=...` takes it. Not to be written to."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    _llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_base_folder: Path) -> Base:
    """The folder loaded as a run loads it, in float32."""
    options = {"revision": None, "dtype": "float32", "device": "cpu", "attention": "sdpa", "quantize": None}
    return load_base(OmegaConf.create({"name": "tiny", "source": None, "path": str(tiny_base_folder), **options}))


@pytest.fixture
def go(tiny_base_folder: Path, tmp_path: Path):
    """A toxicity run in a folder below tmp_path; keyword arguments are changes of `tiny_run.overrides`."""
    from tiny_run import composed, overrides

    from policypatch.pipeline import run

    def start(name: str = "run", /, **changes):
        arguments = overrides(tiny_base_folder, tmp_path, **changes)
        return run(composed(arguments), tmp_path / name, "patch.length=3", arguments)

    return start
