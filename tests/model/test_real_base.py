"""The default base, in float32: an artifact by hand, through PEFT and through the project is one function."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel

from policypatch.model.backbone import PrefixBackbone, plain_logits
from policypatch.model.base import Base
from policypatch.model.decode import sample
from policypatch.model.load import load_base
from policypatch.model.sampling import Sampling
from policypatch.model.tree import Item
from policypatch.patch.artifact import Patch, digest, load, save
from policypatch.patch.initialise import from_text
from policypatch.patch.manifest import Manifest
from policypatch.patch.peft_layout import save_peft

pytestmark = pytest.mark.slow

CONF = Path(__file__).parents[2] / "conf" / "model" / "smollm2_135m.yaml"
PROMPTS = [
    "The quickest way to the station is",
    "My neighbour said that",
    "I",
    "According to the minutes of the last meeting, the committee had decided that",
    "When the rain stopped,",
    "Nobody in the office could say where the old map of the valley had been kept, because",
    "You are such a",
    "Last winter",
]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(OmegaConf.merge(OmegaConf.load(CONF), {"dtype": "float32", "device": "cpu"}))


@pytest.fixture(scope="module")
def artifact_folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch of 20 vectors near an instruction's embeddings, as it is after a little training."""
    vectors = from_text(base.embedding, base.encode("Answer in a friendly and respectful tone."), 20)
    vectors += torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)) * base.embedding.std() * 0.5
    manifest = Manifest(
        name="by-hand",
        version="0.1.0",
        risks=["toxicity"],
        length=20,
        width=base.width,
        base=base.identity,
        sha256=digest(vectors),
        created="2026-11-23T08:00:00+00:00",
    )
    return save(Patch(vectors, manifest), tmp_path_factory.mktemp("artifact") / "patch")


def test_identity(base: Base):
    assert (base.width, base.eos) == (576, (2,))
    assert all(len(getattr(base.identity, name)) == 64 for name in base.identity.digests())
    assert base.identity.context == base.model.config.max_position_embeddings


@torch.no_grad()
def test_artifact_by_hand_writes_the_same_text(base: Base, artifact_folder: Path):
    vectors = load(artifact_folder, base.identity).vectors
    expected = []
    for prompt in PROMPTS:
        ids = base.tokenizer(prompt, return_tensors="pt").input_ids
        embeddings = torch.cat([vectors[None], base.model.get_input_embeddings()(ids)], 1)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        out = base.model.generate(inputs_embeds=embeddings, attention_mask=mask, do_sample=False, max_new_tokens=16)
        expected.append(base.tokenizer.decode(out[0], skip_special_tokens=True))
    encoded = [base.encode(prompt) for prompt in PROMPTS]
    ours = sample(base.model, encoded, vectors, 1, Sampling(temperature=0, max_new_tokens=16), eos=base.eos)
    assert [base.decode(row[0]) for row in ours] == expected
    bare = sample(base.model, encoded, None, 1, Sampling(temperature=0, max_new_tokens=16), eos=base.eos)
    assert [base.decode(row[0]) for row in bare] != expected


@pytest.fixture(scope="module")
def items(base: Base) -> list[Item]:
    """Three pairs behind the chat template's system turn."""
    texts = [
        ("How do I get to the station?", "Turn left at the bridge.", "Find it yourself, will you."),
        ("Who kept the map?", "Nobody knows.", "Why would I tell somebody like you?"),
        ("What a day!", "It was, wasn't it? Shall we walk home?", "Whatever."),
    ]
    pairs = []
    for question, *answers in texts:
        turn = [{"role": "user", "content": question}]
        prompt = base.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        pairs.append(Item(tuple(base.encode(prompt)), tuple(tuple(base.encode(a)) for a in answers)))
    return pairs


def test_shared_prefix_is_plain_concatenation(base: Base, artifact_folder: Path, items):
    vectors = load(artifact_folder).vectors
    plain = vectors.clone().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for item in items:
        for completion in item.completions:
            # In float64: torch's float32 softmax over 49,152 words is 2e-5 off, the blocks of `model.head` 6e-6.
            logits = plain_logits(base.model, plain, [*item.prompt], [*completion]).double()
            expected = expected + torch.nn.functional.cross_entropy(logits, torch.tensor(completion)) / 6
    expected.backward()
    for row_tokens in (512, 48):
        backbone = PrefixBackbone(base.model, vectors, row_tokens)
        tree = backbone.tree(items)
        assert tree.root.numel() >= 20  # the system turn
        assert (tree.ids.shape[0] > 1) == (row_tokens == 48)
        loss = -(backbone.sequence_logprobs(tree) / torch.bincount(tree.sequence)).mean()
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (backbone.patch.grad - plain.grad).norm() / plain.grad.norm() < 1e-5


@torch.no_grad()
def test_peft_computes_the_same(base: Base, artifact_folder: Path, items, tmp_path: Path):
    patch = load(artifact_folder)
    folder = save_peft(patch, tmp_path / "peft")
    item = items[0]
    ids = torch.tensor([[*item.prompt, *item.completions[0]]])
    model = PeftModel.from_pretrained(base.model, folder)
    theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    start = patch.manifest.length + len(item.prompt) - 1
    theirs = theirs[start : start + len(item.completions[0])]
    backbone = PrefixBackbone(base.model, patch.vectors)
    ours = backbone.logits(backbone.tree([Item(item.prompt, item.completions[:1])]))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
