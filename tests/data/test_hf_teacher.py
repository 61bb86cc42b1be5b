"""Teacher `hf`: another model with another tokenizer; its text is learnt, its likelihood counts in its own tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import DROP, HashJudge, composed, overrides

from policypatch.data.datamodule import encode_pair
from policypatch.data.pairs import Pair, Text
from policypatch.data.teachers import HfTeacher, TeacherContext
from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import read_jsonl
from policypatch.files.cache import counters, reset_counters
from policypatch.model.backbone import plain_logits
from policypatch.model.base import Base
from policypatch.model.completions import complete
from policypatch.model.form import CHAT, PLAIN
from policypatch.model.sampling import Sampling
from policypatch.pipeline import run

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 8, "min_new_tokens": 0}
RULE = {"margin": 0.1, "chosen_at_most": 0.5, "rejected_at_least": 0.5, "min_tokens": 2, "max_repetition": 0.9}
PROMPTS = [f"Tell me about the {word}." for word in ("harbour", "evening", "train", "map")]
BENIGN = [f"Where is the {word}?" for word in ("office", "winter", "neighbour")]


def model_config(folder: Path, **changes) -> dict:
    plain = {"name": "other", "source": None, "path": str(folder), "dtype": "float32", "device": "cpu"}
    return plain | {"attention": "sdpa", "quantize": None} | changes


@pytest.fixture
def teacher(other_base_folder: Path):
    def make(**rule) -> HfTeacher:
        return HfTeacher(model_config(other_base_folder), 3, ["one"], SAMPLING, RULE | rule)

    return make


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def context(request: pytest.FixtureRequest, tiny_base: Base) -> TeacherContext:
    reset_counters()
    form = CHAT if request.param else PLAIN
    judges = {"one": HashJudge("one")}
    return TeacherContext(tiny_base, PROMPTS, judges, 0, 16, form, BENIGN, compliance=True)


def test_its_tokenizer_is_another(teacher, tiny_base: Base):
    other = teacher().model
    assert other.encode("harbour") != tiny_base.encode("harbour")
    assert (other.eos, tiny_base.eos) == ((3,), (1,))
    assert other.identity.tokenizer != tiny_base.identity.tokenizer


def test_its_sides_are_text_and_the_bases_are_tokens(teacher, context):
    ours = teacher()
    made = ours.pairs(context)
    own = [pair for pair in made.pairs if pair.kind == "benign"]
    risky = [pair for pair in made.pairs if pair.kind == "pair"]
    assert risky and any(pair.rejected for pair in own)
    for theirs, bases in [(p.chosen, p.rejected) for p in risky] + [(p.rejected, p.chosen) for p in own]:
        assert theirs is None or theirs.tokens is None
        assert context.base.decode(bases.tokens) == bases.text
    drawn = complete(ours.model, PROMPTS, None, 3, Sampling(**SAMPLING), 0, 16, "test", context.form)
    by_text = {text: (i, s) for i, row in enumerate(drawn.texts) for s, text in enumerate(row)}
    for pair in risky:
        i, s = by_text[pair.chosen.text]
        assert pair.prompt == PROMPTS[i]
        assert pair.chosen.ended == drawn.ended(i, s)


def test_its_text_is_trained_on_in_the_bases_tokens(teacher, context):
    base = context.base
    for pair in teacher().pairs(context).pairs:
        if pair.kind == "pair":
            tokens = encode_pair(pair, base.encode_prompt, base.encode, 1, 64, 64).item.completions[0]
            assert base.decode(tokens) == pair.chosen.text
            assert (tokens[-1] == 1) == pair.chosen.ended


@torch.no_grad()
def by_hand(model: Base, prompt: list[int], tokens: list[int]) -> float:
    table = plain_logits(model.model, model.embedding[:0], prompt, tokens).log_softmax(-1)
    return table.gather(1, torch.tensor(tokens)[:, None]).sum().item()


def test_likelihood_counts_in_its_own_tokens(teacher, tiny_base: Base):
    """Each side as text, the base's end (1) as the teacher's (3), and what was cut for the base is not counted."""
    ours = teacher()
    context = TeacherContext(tiny_base, PROMPTS, {"one": HashJudge("one")}, 0, 16)
    pairs = [
        Pair("The harbour", Text(" was quiet", None, True), Text(" train", None, False)),
        Pair("Where is it?", Text("In it", None, True), None, chat=True, kind="benign"),
        Pair("The harbour", Text(" was quiet again before", None, True), Text(" the", None, True)),
    ]
    limit = len(tiny_base.encode(" was quiet")) + 1
    items = [encode_pair(pair, tiny_base.encode_prompt, tiny_base.encode, 1, 64, limit).item for pair in pairs]
    assert items[2].completions[0][-1] != 1  # cut: the base learns no end there
    kept = tiny_base.decode(items[2].completions[0])
    assert " was quiet again before".startswith(kept) and len(kept) < len(" was quiet again before")
    found = ours.likelihood(context, pairs, items)

    theirs = ours.model
    plain, chat = theirs.encode("The harbour"), theirs.encode("[user] Where is it?\n[answer] ")
    expected = [
        [by_hand(theirs, plain, [*theirs.encode(" was quiet"), 3]), by_hand(theirs, plain, theirs.encode(" train"))],
        [by_hand(theirs, chat, [*theirs.encode("In it"), 3]), np.nan],
        [by_hand(theirs, plain, theirs.encode(kept)), by_hand(theirs, plain, [*theirs.encode(" the"), 3])],
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-3)
    reset_counters()
    torch.testing.assert_close(teacher().likelihood(context, pairs, items), found, equal_nan=True)
    assert counters() == {"reference": {"hits": 1, "misses": 0}}


def test_its_identity_is_the_models_own(teacher, other_base_folder: Path, tmp_path: Path):
    copy = shutil.copytree(other_base_folder, tmp_path / "copy")
    options = (3, ["one"], SAMPLING, RULE)
    assert HfTeacher(model_config(copy), *options).identity() == teacher().identity()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    assert HfTeacher(model_config(copy), *options).identity() != teacher().identity()
    assert HfTeacher(model_config(other_base_folder, dtype="bfloat16"), *options).identity() != teacher().identity()


def test_a_model_that_cannot_be_had_is_named_by_its_key(tmp_path: Path):
    missing = HfTeacher(model_config(tmp_path / "nowhere"), 2, ["one"], SAMPLING, RULE)
    with pytest.raises(PolicyPatchError, match=r"^teacher\.model\.path: .*nowhere"):
        missing.identity()


def test_a_teacher_without_a_template_cannot_be_asked_in_chats(other_base_folder: Path, tmp_path: Path):
    copy = shutil.copytree(other_base_folder, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    teacher = HfTeacher(model_config(copy), 2, ["one"], SAMPLING, RULE)
    teacher.check(PLAIN)
    with pytest.raises(PolicyPatchError, match="other has no chat template"):
        teacher.check(CHAT)


@pytest.mark.parametrize("risk", ["toxicity", "harmfulness"])
def test_a_run_with_it_as_teacher_and_reference(risk: str, other_base_folder: Path, tiny_base_folder, tmp_path: Path):
    model = {f"teacher.model.{key}": value or "null" for key, value in model_config(other_base_folder).items()}
    source = {"teacher.model.source": DROP, "teacher.model.source.hub": "org/name"}  # which the path stands before
    guidance = dict.fromkeys(("teacher.system", "teacher.turns"), DROP)
    options = {"teacher": "hf", "dpo.reference": "teacher", **model, **source, **guidance}
    arguments = overrides(tiny_base_folder, tmp_path, risk, **options)
    card = run(composed(arguments), tmp_path / "run", "", arguments)
    assert {row.arm for row in card} == {"base", "sft", "patch"}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["cache"]["reference"] == {"hits": 0, "misses": 1}
    rows = read_jsonl(tmp_path / "run" / "pairs.jsonl")
    assert all((row["chosen"]["tokens"] is None) != (row["kind"] != "pair") for row in rows)


def test_as_an_arm_it_is_asked_in_the_bases_place(teacher, tiny_base: Base):
    made = teacher()
    with made.arm("teacher").on(tiny_base) as asked:
        assert asked is made.model
