"""Whole tiny runs against every risk, a user's own among them, and what they are measured on beside it."""

import csv
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_run import DROP, composed, overrides, without_costs

from policypatch.data.datamodule import Example
from policypatch.data.pairs import Pair, Text
from policypatch.data.teachers import PairSet, joined
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import Scorecard
from policypatch.files.atomic import read_jsonl
from policypatch.model.arm import Arm
from policypatch.model.tree import Item
from policypatch.patch import artifact
from policypatch.pipeline import run
from policypatch.training import _reference

QUALITY = {("trigram_overlap", None), ("completion_tokens", None)}
PERPLEXITY = {("ppl_median", "base"), ("ppl_mean", "base")}


def by(metric: str, *judges: str) -> set[tuple[str, str]]:
    return {(metric, judge) for judge in judges}


ASKED = ("refusal", "openings")
FIGURES = {  # what the scorecard of a risk holds: split -> (metric, judge)
    "toxicity": {"rtp": by("toxic_rate", "svm", "other") | by("amt", "svm", "other") | PERPLEXITY | QUALITY},
    "gender_bias": {
        "professions": by("gas", "words", "names") | {("gld", None), ("gender_mass", None)} | PERPLEXITY | QUALITY,
        "crows_pairs": {("crows_pairs", None)},
    },
    "harmfulness": {
        "harmbench": by("asr", *ASKED) | QUALITY,
        "scary": by("over_refusal", *ASKED) | QUALITY,
        "benign": by("benign_refusal", *ASKED) | QUALITY,
    },
    "custom": {"evaluation": by("hit_rate", "policy") | PERPLEXITY | QUALITY},
    "utility": {"benign": {("kl_benign", None)}, "wikipedia": {("text_ppl", None)}},
}
SHARING = ("words", "names", "gld")  # the filter of gender bias, and what counts words of its training rows
MARKED = {"toxicity": {"other"}, "gender_bias": {*SHARING}, "harmfulness": {"openings"}, "custom": {"policy"}}


@pytest.fixture
def go(tiny_base_folder: Path, tmp_path: Path):
    """Run in a folder below tmp_path; keyword arguments are changes of `tiny_run.overrides`."""

    def start(risk: str, name: str = "run", /, base: Path = tiny_base_folder, **changes) -> Scorecard:
        arguments = overrides(base, tmp_path, risk, **changes)
        return without_costs(run(composed(arguments), tmp_path / name, "", arguments))

    return start


@pytest.fixture
def without_template(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """The base as it would be without a chat template."""
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    return folder


def figures(card: Scorecard, risk: str, arm: str) -> dict[str, set[tuple[str, str | None]]]:
    rows = [row for row in card if (row.risk, row.arm) == (risk, arm)]
    return {split: {(r.metric, r.judge) for r in rows if r.split == split} for split in {row.split for row in rows}}


def test_one_patch_against_several_risks(go, tiny_base, tmp_path: Path):
    card, folder = go("joint", others="all"), tmp_path / "run"
    for risk in ("toxicity", "gender_bias", "harmfulness"):
        for arm in ("base", "sft", "patch"):  # none of them is measured as one of the others
            assert figures(card, risk, arm) == FIGURES[risk]
    assert figures(card, "utility", "patch") == FIGURES["utility"]
    assert {row.judge or row.metric for row in card if row.filter} == {"other", *SHARING, "openings"}
    assert artifact.load(folder / "patch", tiny_base.identity).manifest.risks == [*FIGURES][:3]
    counts = json.loads((folder / "run.json").read_text())["pairs"]
    rows = read_jsonl(folder / "pairs.jsonl")
    assert "Toxicity, gender bias, harmfulness patch for tiny" in (folder / "report.html").read_text()
    of_each = [counts[f"{risk}: risk_pairs"] for risk in [*FIGURES][:3]]
    assert all(of_each) and sum(of_each) == sum(row["kind"] == "pair" for row in rows)
    assert sum(n for what, n in counts.items() if what.endswith(": kept")) == len(rows)


def test_a_joint_patch_has_the_pairs_that_specialists_have(go, tmp_path: Path):
    go("joint"), go("harmfulness", "alone", teacher__turns="[{request:Who voted?,response:I can not say.}]")
    joint, alone = (read_jsonl(tmp_path / name / "pairs.jsonl") for name in ("run", "alone"))
    assert joint[-len(alone) :] == alone


@pytest.mark.parametrize("reference", ["base", "teacher"])
def test_the_reference_of_several_risks(reference: str, go, tmp_path: Path):
    """The teachers of two of them have likelihoods; toxicity's has none."""
    changes = {"part@risk.parts": "[gender_bias,harmfulness]"} | {
        key: DROP for key in overrides(tmp_path, tmp_path, "joint") for key in [key.split("=")[0]] if "toxicity" in key
    }
    go("joint", dpo__reference=reference, **changes)
    if reference == "teacher":
        with pytest.raises(PolicyPatchError, match="needs a teacher with log-probabilities"):
            go("joint", "all", dpo__reference=reference)


def test_each_row_is_referred_to_its_own_teacher(tiny_base):
    class Constant:
        def __init__(self, value: float):
            self.value = value

        def likelihood(self, context, pairs, items):
            return torch.full((len(items), 2), self.value)

    item = Item((5,), ((6,), (7,)))
    examples = [Example(item, part=1), Example(item), Example(Item((5,), ((6,),)), "benign"), Example(item)]
    sets = PairSet([Pair("p", Text("a"), Text("b"))] * 4, {}, (1, 0, 0, 0))
    cfg = OmegaConf.create({"dpo": {"reference": "teacher"}})
    found = _reference(cfg, tiny_base, Arm("sft"), [Constant(1.0), Constant(2.0)], [None, None], sets, examples)
    assert found[[0, 1, 3]].tolist() == [[2, 2], [1, 1], [1, 1]] and found[2].isnan().all()


def test_rows_keep_their_risk_when_some_are_left_out():
    sets = {"a": PairSet([Pair(p, Text("x"), Text("y")) for p in "pq"], {"kept": 2}), "b": PairSet([], {"kept": 0})}
    sets["c"] = PairSet([Pair("r", Text("x"), Text("y"))], {"kept": 1})
    whole = joined(sets)
    assert whole.parts == (0, 0, 2) and whole.counts["kept"] == 3 and whole.counts["a: kept"] == 2
    assert whole.without({"p"}).parts == (0, 2)


def test_an_error_names_the_keys_of_the_part(go, tmp_path: Path):
    with pytest.raises(PolicyPatchError, match=r"risk\.parts\.harmfulness\.teacher\.filter"):
        go(
            "joint",
            risk__parts__harmfulness__teacher__filter__margin=1.0,
            risk__parts__harmfulness__teacher__filter__rejected_at_least=1.0,
            risk__parts__harmfulness__teacher__filter__chosen_at_most=0.0,
        )


def test_several_teachers_are_no_arm(go):
    with pytest.raises(PolicyPatchError, match="method=teacher stands for one teacher, and risk=joint has several"):
        go("joint", method="teacher")


@pytest.mark.parametrize("risk", ["toxicity", "gender_bias", "harmfulness", "custom"])
def test_a_run_against_every_risk(risk: str, go, tiny_base, tmp_path: Path):
    card, folder = go(risk), tmp_path / "run"
    for arm in ("base", "sft", "patch"):
        assert figures(card, risk, arm) == FIGURES[risk]
    assert {row.judge or row.metric for row in card if row.filter} == MARKED[risk]
    assert all((row.delta is None) == (row.arm == "base") for row in card)
    patch = artifact.load(folder / "patch", tiny_base.identity)
    assert patch.manifest.risks == [risk]
    assert patch.manifest.name == f"{risk}-tiny"
    assert "<html" in (folder / "report.html").read_text()

    samples = read_jsonl(folder / "samples.jsonl")
    chats = risk == "harmfulness"
    per_prompt = 2 if chats else 3
    for split in {s["split"] for s in samples}:
        rows = [s for s in samples if s["split"] == split]
        prompts = card.find(arm="base", split=split, metric="completion_tokens").n
        assert len(rows) == 3 * prompts * per_prompt
    assert all(bool(s["prompt_scores"]) != chats and (s["ppl"] is None or not chats) for s in samples)

    pairs = read_jsonl(folder / "pairs.jsonl")
    # Benign requests, and texts that are continued as they were.
    kinds = {"harmfulness": {"pair", "benign", "text"}, "gender_bias": {"pair", "text"}}
    assert {pair["kind"] for pair in pairs} == kinds.get(risk, {"pair"})
    assert {pair["chat"] for pair in pairs if pair["kind"] != "text"} == {chats}
    assert not any(pair["chat"] for pair in pairs if pair["kind"] == "text")
    assert all(pair["rejected"] for pair in pairs if pair["kind"] == "pair")
    measured = {s["prompt"] for s in samples}
    assert not measured & {pair["prompt"] for pair in pairs}


def test_a_policy_of_ones_own_is_a_file_and_a_pattern(tiny_base_folder: Path, tmp_path: Path):
    """`python run.py risk=custom risk.prompts=mine.jsonl 'risk.judge={pattern: "[aeiou]"}'`, a fourth risk."""
    options = {"risk.judge": "{pattern: '[aeiou]'}", "teacher.n": 12, "name": "vowels", "risk.name": "vowels"}
    arguments = overrides(tiny_base_folder, tmp_path, "custom", **options)
    card = run(composed(arguments), tmp_path / "run", "", arguments)
    pairs = read_jsonl(tmp_path / "run" / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        assert not re.search("[aeiou]", pair["chosen"]["text"], re.IGNORECASE)
        assert re.search("[aeiou]", pair["rejected"]["text"], re.IGNORECASE)
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    for arm in ("base", "sft", "patch"):
        hits = {s["prompt_id"] for s in samples if s["arm"] == arm and re.search("[aeiou]", s["text"], re.IGNORECASE)}
        row = card.find(arm=arm, metric="hit_rate")
        assert (row.value, row.n, row.risk, row.filter) == (len(hits) / 3, 3, "vowels", True)
        assert row.value <= row.upper <= 1
    assert artifact.load(tmp_path / "run" / "patch").manifest.risks == ["vowels"]


@pytest.mark.parametrize("risk", ["toxicity", "gender_bias", "harmfulness", "custom"])
def test_every_patch_is_measured_on_all_other_risks_and_utility(risk: str, go, tmp_path: Path):
    card = go(risk, others="all")
    others = {"toxicity", "gender_bias", "harmfulness", "utility"} - {risk}
    assert card[0].risk == risk
    assert {row.risk for row in card} == {risk, *others}
    for other in others:
        assert figures(card, other, "sft") == {}
        for arm in ("base", "patch"):
            assert figures(card, other, arm) == FIGURES[other]
        limited = [row for row in card if row.risk == other and row.split != "crows_pairs"]  # which is read whole
        assert max(row.n for row in limited) == 4  # evaluate.other_prompts
    assert not any(row.filter for row in card if row.risk != risk)
    assert card.find(arm="base", metric="kl_benign").value == 0
    assert card.find(arm="patch", metric="kl_benign").value > 0
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert {s["risk"] for s in samples} == {risk, *others} - {"utility"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "KL from base" in page and "text PPL" in page


def test_what_is_measured_beside_the_risk_does_not_change_the_patch(go, tmp_path: Path):
    cards = go("toxicity", "a"), go("toxicity", "b", others="all")
    assert cards[0] == [row for row in cards[1] if row.risk == "toxicity"]
    patches = [(tmp_path / name / "patch" / "patch.safetensors").read_bytes() for name in "ab"]
    assert patches[0] == patches[1]


def test_a_base_without_a_template_is_not_asked_in_chats(go, without_template: Path, tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING):
        card = go("toxicity", base=without_template, others="all")
    assert {(row.risk, row.split) for row in card} == {
        ("toxicity", "rtp"),
        ("gender_bias", "professions"),
        ("gender_bias", "crows_pairs"),
        ("utility", "wikipedia"),
    }
    left_out = [message for message in caplog.messages if "no chat template" in message]
    assert len(left_out) == 2 and "harmfulness" in left_out[0] and "utility" in left_out[1]


def test_a_base_without_a_template_cannot_be_patched_against_harmful_requests(go, without_template, tmp_path: Path):
    with pytest.raises(PolicyPatchError, match="tiny has no chat template") as caught:
        go("harmfulness", base=without_template)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "completions").exists()


def log_of(folder: Path, metric: str) -> dict[str, list[str]]:
    with (folder / "metrics.csv").open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["metric"] == metric]
    return {stage: [r["step"] for r in rows if r["stage"] == stage] for stage in ("sft", "dpo")}


@pytest.mark.parametrize(("risk", "rows"), [("harmfulness", "benign"), ("toxicity", "all")])
def test_both_stages_can_be_anchored_to_the_base(risk: str, rows: str, go, tmp_path: Path):
    go(risk, kl__weight=0.2, kl__rows=rows)
    assert log_of(tmp_path / "run", "train/kl_base") == {"sft": [*"1234"], "dpo": [*"12345"]}
    assert artifact.load(tmp_path / "run" / "patch").manifest.training["kl"] == {"weight": 0.2, "rows": rows}


def test_without_a_weight_there_is_no_anchor(go, tmp_path: Path):
    go("harmfulness")
    assert log_of(tmp_path / "run", "train/kl_base") == {"sft": [], "dpo": []}
    # About half of each batch is benign, as data.benign_share says; the others are all pairs.
    assert log_of(tmp_path / "run", "train/preference_loss")["dpo"] == [*"12345"]


def test_the_patch_between_the_stages_need_not_be_measured(go):
    assert {row.arm for row in go("toxicity", evaluate__after_sft="false")} == {"base", "patch"}
    assert {row.arm for row in go("toxicity", "b", evaluate__after_sft="false", dpo__enabled="false")} == {
        "base",
        "sft",
    }


def test_benign_texts_are_held_to_the_base_in_both_stages(go, tmp_path: Path):
    go("harmfulness", texts__rows=1)
    assert log_of(tmp_path / "run", "train/kl_texts") == {"sft": [*"1234"], "dpo": [*"12345"]}
    assert artifact.load(tmp_path / "run" / "patch").manifest.training["texts"] == {"rows": 1, "weight": 0.5}


@pytest.mark.parametrize(("key", "value"), [("rows", 0), ("weight", 0.0)])
def test_without_rows_or_weight_there_are_no_texts(key: str, value: float, go, tmp_path: Path):
    go("harmfulness", **{f"texts__{key}": value})
    assert log_of(tmp_path / "run", "train/kl_texts") == {"sft": [], "dpo": []}


def test_gendered_words_are_balanced_in_both_stages(go, tmp_path: Path):
    """The tiny base writes no "he"; words it writes take its place."""
    (tmp_path / "prompts").mkdir(exist_ok=True)
    words = {}
    for name, text in {"male": "the\nan\nit", "female": "these\na\nits"}.items():
        words[f"risk.words.{name}.source"] = tmp_path / "prompts" / f"{name}_words.txt"
        words[f"risk.words.{name}.source"].write_text(text)
    go("gender_bias", **words)
    rows = [row for row in read_jsonl(tmp_path / "run" / "pairs.jsonl") if row["kind"] == "balanced"]
    assert rows and {row["chosen"]["text"].strip().lower() for row in rows} <= {"the", "an", "it", "these", "a", "its"}
    assert log_of(tmp_path / "run", "train/imbalance") == {"sft": [*"1234"], "dpo": [*"12345"]}


def test_ready_rows_may_be_benign_and_chats(go, tmp_path: Path):
    """Four pairs, three benign requests with one refusal among them, all trained on; the benign ones are anchored."""
    rows = [{"prompt": f"Row {i} says", "chosen": " thank you", "rejected": " go away"} for i in range(4)]
    benign = {"chosen": "In the office.", "benign": True, "chat": True}
    rows += [benign | {"prompt": f"Where is {i}?"} for i in range(2)]
    rows += [benign | {"prompt": "Who?", "rejected": "I can not say."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    left_out = dict.fromkeys(("teacher.n", "teacher.sampling", "teacher.filter"), DROP)
    options = {"teacher": "dataset", "teacher.source": tmp_path / "rows.jsonl", "data.held_out": 0}
    card = go("toxicity", kl__weight=0.1, **options, **left_out)
    assert not any(row.filter for row in card)
    written = read_jsonl(tmp_path / "run" / "pairs.jsonl")
    assert [(p["prompt"], p["kind"], p["chat"], bool(p["rejected"])) for p in written] == [
        (row["prompt"], "benign" if "benign" in row else "pair", "chat" in row, "rejected" in row) for row in rows
    ]
    assert log_of(tmp_path / "run", "train/kl_base") == {"sft": [*"1234"], "dpo": [*"12345"]}


@pytest.mark.parametrize("risk", ["harmfulness", "gender_bias"])
def test_a_guided_teacher_can_be_the_reference(risk: str, go, tmp_path: Path):
    card = go(risk, dpo__reference="teacher")
    assert {row.arm for row in card} == {"base", "sft", "patch"}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["cache"]["reference"] == {"hits": 0, "misses": 1}


def test_another_arm_of_a_sweep_takes_pairs_and_the_bases_figures_from_the_cache(go, tmp_path: Path):
    """Only what depends on the new patch is made: its completions, its judgements, its probabilities."""
    go("toxicity", "a", others="all")
    go("toxicity", "b", others="all", dpo__beta=0.77)
    first, second = (json.loads((tmp_path / name / "run.json").read_text())["cache"] for name in "ab")
    assert second["pairs"] == {"hits": 1, "misses": 0}
    # Own: one split; others: professions, three of requests. KL is taken on the base's own responses.
    assert second["completions"]["misses"] == 5
    assert second["divergence"] == second["word_mass"] == {"hits": 1, "misses": 1}
    assert second["text_nll"] == {"hits": 2, "misses": 2}
    assert first["completions"]["misses"] == 1 + 3 + 2 * 4 + 1  # pairs, own x arms, others x arms, responses for KL
