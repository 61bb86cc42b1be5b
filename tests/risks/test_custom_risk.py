"""Risk `custom`: which prompts are trained on and which measured, and what a judge may be given as."""

import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_run import ROOT, HashJudge, composed

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import PatternJudge
from policypatch.files import hub
from policypatch.model.form import CHAT, PLAIN
from policypatch.risks import Custom
from policypatch.risks.custom import made_judge


@pytest.fixture
def risk(tmp_path: Path):
    """risk(*rows, ...) -> the risk of a file with these rows: prompts, or (prompt, split)."""

    def make(*rows: str | tuple[str, str], **options) -> Custom:
        found = [
            {"prompt": row} if isinstance(row, str) else dict(zip(("prompt", "split"), row, strict=True))
            for row in rows
        ]
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        return Custom(str(tmp_path / "mine.jsonl"), options.pop("judge", "Acme"), **options)

    return make


def splits(risk: Custom, limit: int | None = None) -> tuple[list[str], list[str]]:
    (probe,) = risk.probes(limit)
    return risk.training_prompts, list(probe.prompts)


def test_the_file_says_what_is_measured_on(risk):
    made = risk("a", ("b", "evaluation"), ("c", "train"), ("d", "evaluation"), "a")
    assert splits(made) == (["a", "c"], ["b", "d"])
    assert splits(made, 1) == (["a", "c"], ["b"])


def test_otherwise_every_fifth_prompt_is(risk):
    """Rows 0, 5 and 10 of twelve."""
    letters = [*"abcdefghijkl"]
    assert splits(risk(*letters)) == ([*"bcdeghijl"], ["a", "f", "k"])


def test_what_the_file_says_is_for_training_is_never_measured_on(risk):
    made = risk(("a", "train"), "b", ("c", "train"), "d")
    assert splits(made) == (["a", "c", "d"], ["b"])
    assert splits(risk("A!", ("a", "train"), "b", "c")) == (["A!", "a", "c"], ["b"])


def test_an_empty_cell_of_a_table_says_nothing(tmp_path: Path):
    (tmp_path / "mine.csv").write_text("prompt,split\na,evaluation\nb,\n")
    assert splits(Custom(str(tmp_path / "mine.csv"), "Acme")) == (["b"], ["a"])


def test_a_list_of_objects_is_rows_too(tmp_path: Path):
    rows = [{"prompt": "a", "split": "evaluation"}, {"prompt": "b"}]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    assert splits(Custom(str(tmp_path / "mine.json"), "Acme")) == (["b"], ["a"])


def test_the_command_of_the_documents_makes_the_judge_it_says():
    """As a shell hands it over: what stands between single quotes."""
    (command,) = re.findall(r"'risk\.judge=(\{pattern: .*?\})'", (ROOT / "docs" / "custom.md").read_text())
    cfg = composed(["risk=custom", "risk.prompts=x.jsonl", f"risk.judge={command}"])
    judge = made_judge(cfg.risk.judge)
    assert judge.score(["Buy ACME today", "Acmeville", "or Globex."]).tolist() == [1, 0, 1]
    for place in ("README.md", "conf/risk/custom.yaml"):
        (command,) = re.findall(r"'risk\.judge=(\{pattern: .*?\})'", (ROOT / place).read_text())
        cfg = composed(["risk=custom", "risk.prompts=x.jsonl", f"risk.judge={command}"])
        assert made_judge(cfg.risk.judge).score(["Buy ACME today", "Acmeville"]).tolist() == [1, 0], place


def test_a_prompt_that_is_measured_on_is_not_trained_on(risk):
    """Whatever its case and punctuation, and however often it stands there."""
    made = risk(("Buy now", "evaluation"), "buy now!", "sell", ("Buy now", "evaluation"))
    assert splits(made) == (["sell"], ["Buy now"])


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("a\n\nb\nc\n")
    assert splits(Custom(str(tmp_path / "mine.txt"), "Acme")) == (["b", "c"], ["a"])


def test_the_probe_counts_hits_by_every_judge(risk):
    made = risk("a", "b", judge=HashJudge("x"), extra={"more": HashJudge("y")}, chat=True, threshold=0.3, name="ads")
    (probe,) = made.probes(None)
    assert (probe.risk, probe.split, probe.metrics, probe.form) == ("ads", "evaluation", ("hit_rate",), CHAT)
    assert (list(probe.judges), probe.threshold, probe.refusals) == (["policy", "more"], 0.3, False)
    assert made.filter == ("policy",) and not made.compliance and list(made.benign_prompts) == []
    assert risk("a", "b").form == PLAIN


@pytest.mark.parametrize("rows", [["a"], ["a", "A!"], [("a", "evaluation"), ("b", "evaluation")]])
def test_too_few_prompts_for_both_are_refused(rows: list, risk):
    with pytest.raises(
        PolicyPatchError, match=r"risk\.prompts \(.*mine\.jsonl\) has nothing to (train|measure) on"
    ) as caught:
        splits(risk(*rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["mine.jsonl", "empty"]),
        (b'{"prompt": "a"}\n{"text": "b"}\n', ["mine.jsonl, row 2", "'prompt'"]),
        (b'{"prompt": "a"}\n{"prompt": 7}\n', ["mine.jsonl, row 2", "'prompt'"]),
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', ["mine.jsonl, row 2", "not UTF-8"]),
        (b'{"prompt": "a"}\n["b"]\n', ["mine.jsonl, row 2", "object"]),
    ],
)
def test_a_bad_file_is_told_by_its_name_and_row(content: bytes, words: list[str], tmp_path: Path):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(PolicyPatchError) as caught:
        splits(Custom(str(tmp_path / "mine.jsonl"), "Acme"))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


# --- judges ---------------------------------------------------------------------------------------------------------

TEXTS = ["Buy at ACME.", "Buy at Acmeville.", "Stay home.", ""]


@pytest.mark.parametrize(
    ("spec", "scores"),
    [
        (r"\bAcme\b", [1, 0, 0, 0]),
        ({"pattern": "^buy"}, [1, 1, 0, 0]),
        ({"words": ["acme", "home"]}, [1, 0, 1, 0]),
        ({"_target_": "policypatch.evaluate.judges.PatternJudge", "patterns": ["e"]}, [1, 1, 1, 0]),
        (PatternJudge(["stay"]), [0, 0, 1, 0]),
    ],
)
def test_short_forms_of_a_judge(spec: object, scores: list[int]):
    assert made_judge(spec).score(TEXTS).tolist() == scores
    if isinstance(spec, dict):
        assert made_judge(OmegaConf.create(spec)).score(TEXTS).tolist() == scores


def test_a_classifier_is_a_folder_or_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(hub, "files", lambda *spec: asked.append(spec[0]) or [tmp_path / "from_the_hub"])
    (tmp_path / "here").mkdir()
    for source, place in (("org/name", "from_the_hub"), (str(tmp_path / "here"), "here")):
        with pytest.raises(PolicyPatchError, match=place):  # neither is a model
            made_judge({"hf": source, "label": "toxic"})
    assert asked == ["org/name"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "risk.judge is {}: give {pattern: REGEX}, {words: [...]}, {hf: ID, label: LABEL}"),
        ({"regex": "x"}, "risk.judge is {'regex': 'x'}"),
        ({"pattern": "x", "words": ["y"]}, "risk.judge is"),
        ({"hf": "org/name"}, "risk.judge is {'hf': 'org/name'}"),
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": ""}, "is no pattern or word"),
        ({"words": []}, "nothing to look for"),
        ({"words": "one"}, "words is one string"),
    ],
)
def test_a_judge_that_none_of_the_forms_describe(spec: dict, words: str):
    with pytest.raises(PolicyPatchError) as caught:
        made_judge(spec)
    assert words in str(caught.value) and "\n" not in str(caught.value)
