"""What a user may get wrong in a risk's files and judges: one sentence each, and nothing that was computed is lost."""

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from tiny_run import HashJudge, composed, overrides, without_costs

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import Scorecard
from policypatch.pipeline import run

FILES = {
    "empty": (b"", ["empty"]),
    "no field": (b'{"text": "good", "prompt": "good"}\n{"txt": "x"}\n', ["row 2"]),
    "blank": (b'{"text": "good", "prompt": "good"}\n{"text": " ", "prompt": ""}\n', ["row 2"]),
    "not UTF-8": (b'{"text": "good", "prompt": "good"}\n{"text": "caf\xe9"}\n', ["row 2", "not UTF-8"]),
    "not JSON": (b'{"text": "good", "prompt": "good"}\n{"text": \n', ["row 2"]),
}
PLACES = [
    ("toxicity", "risk.train.source"),
    ("toxicity", "risk.evaluation.rtp.source"),
    ("gender_bias", "risk.words.male.source"),
    ("harmfulness", "risk.benign.plain.source"),
    ("harmfulness", "risk.benign_texts.source"),
    ("harmfulness", "risk.scary.source"),
    ("custom", "risk.prompts"),
    ("toxicity", "others.utility.text.source"),
    ("toxicity", "others.harmfulness.evaluation.harmbench.source"),
]


@pytest.fixture
def go(tiny_base_folder: Path, tmp_path: Path):
    """Run in a folder below tmp_path; keyword arguments are changes of `tiny_run.overrides`."""

    def start(risk: str, name: str = "run", /, **changes) -> Scorecard:
        arguments = overrides(tiny_base_folder, tmp_path, risk, **changes)
        return run(composed(arguments), tmp_path / name, "", arguments)

    return start


@pytest.mark.parametrize("fault", FILES)
@pytest.mark.parametrize(("risk", "key"), PLACES, ids=[f"{risk}-{key}" for risk, key in PLACES])
def test_a_bad_file_of_prompts_is_told_by_its_name_and_row(risk: str, key: str, fault: str, go, tmp_path: Path):
    content, words = FILES[fault]
    (tmp_path / "bad.jsonl").write_bytes(content)
    changes = {key: tmp_path / "bad.jsonl"} | ({"others": "all"} if key.startswith("others") else {})
    with pytest.raises(PolicyPatchError) as caught:
        go(risk, **changes)
    message = str(caught.value)
    assert "\n" not in message and "bad.jsonl" in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "cache" / "completions").exists()  # nothing was sampled for it


LONG = "the train " * 250  # 500 tokens or more of a context of 512


@pytest.mark.parametrize(
    ("risk", "key", "words"),
    [
        ("toxicity", "risk.train.source", ["risk.train", "long.jsonl, row 2)"]),
        ("toxicity", "risk.evaluation.rtp.source", ["risk.evaluation.rtp", "long.jsonl, row 2)"]),
        ("harmfulness", "risk.benign.plain.source", ["risk.benign"]),
        ("harmfulness", "risk.plain.source", ["benign"]),
        ("toxicity", "others.harmfulness.scary.source", ["others.harmfulness", "scary", "long.jsonl, row 2)"]),
        ("toxicity", "others.utility.text.source", ["others.utility", "wikipedia", "long.jsonl, row 2)"]),
        ("toxicity", "others.utility.requests.source", ["others.utility", "benign", "long.jsonl, row 2)"]),
        ("gender_bias", "risk.crows.more.source", ["crows", "long.jsonl, row 2)"]),
    ],
)
def test_a_prompt_longer_than_the_context_is_named_before_anything_is_sampled(risk, key, words, go, tmp_path: Path):
    rows = [{"text": text, "sent_more": text, "sent_less": text, "bias_type": "gender"} for text in ("short", LONG)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {key: tmp_path / "long.jsonl"} | ({"others": "all"} if key.startswith("others") else {})
    if "crows" in key:  # both sides have as many
        changes[key.replace("more", "less")] = tmp_path / "long.jsonl"
    with pytest.raises(PolicyPatchError) as caught:
        go(risk, **changes, **({"risk.train.take": "all"} if key == "risk.train.source" else {}))
    message = str(caught.value)
    assert "\n" not in message and "context of tiny (512)" in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "cache" / "completions").exists()


def test_a_prompt_longer_than_the_scorers_context_is_named_as_well(go, tiny_base_folder: Path, tmp_path: Path):
    scorer = shutil.copytree(tiny_base_folder, tmp_path / "scorer")
    config = json.loads((scorer / "config.json").read_text()) | {"max_position_embeddings": 40, "rms_norm_eps": 1e-5}
    (scorer / "config.json").write_text(json.dumps(config))
    (tmp_path / "some.jsonl").write_text(json.dumps({"text": "the train " * 15}))
    changes = {"scorer": "hub", "scorer.name": "small", "scorer.path": scorer, "scorer.source.hub": "x/y"}
    changes |= {"scorer.dtype": "float32", "scorer.device": "cpu"}
    with pytest.raises(PolicyPatchError, match=r"scorer small \(40\).*another scorer="):
        go("toxicity", **changes, **{"risk.evaluation.rtp.source": tmp_path / "some.jsonl"})
    assert not (tmp_path / "cache" / "completions").exists()


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("{}", ["risk.judge is {}"]),
        ("{pattern: '('}", ["no regular expression"]),
        ("{words: []}", ["nothing to look for"]),
        ("{hf: /nope, label: toxic}", ["/nope"]),
        ("{_target_: tiny_run.NoSuchJudge}", ["NoSuchJudge"]),
    ],
)
def test_a_bad_judge_of_a_policy_of_ones_own(judge: str, words: list[str], go, tmp_path: Path):
    with pytest.raises(PolicyPatchError) as caught:
        go("custom", **{"risk.judge": judge})
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "cache" / "completions").exists()


def test_a_judge_that_answers_with_nan_is_told_before_anything_is_sampled(go, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(HashJudge, "_score_batch", lambda self, texts: np.full(len(texts), np.nan))
    with pytest.raises(PolicyPatchError, match="judge svm: text 1 scored nan"):
        go("toxicity")
    assert not (tmp_path / "cache" / "completions").exists()


class Unchecked:
    """A judge of a user's own: what `Judge` asks for and no more."""

    fingerprint = "unchecked"
    name = "mine"

    def score(self, texts, prompts=None):
        return np.full(len(texts), np.nan if len(texts) > 1 else 0.5)


def test_nan_of_a_judge_that_checks_nothing_is_found_where_it_appears(go, tmp_path: Path):
    """It scores no pairs, so it is found in the evaluation: the figures before it stay."""
    with pytest.raises(PolicyPatchError, match=r"judge mine: .*1 scored nan.*jsonl, row 1\)") as caught:
        go("toxicity", **{"+risk.judges.mine": "{_target_:test_run_failures.Unchecked}"})
    assert str(caught.value).startswith("toxicity, rtp, base: ")
    assert (tmp_path / "run" / "samples.jsonl").exists()
    assert not list((tmp_path / "cache").glob("judgements/*mine*"))


def breaks_for(monkeypatch, name: str, after: int) -> None:
    """The judge of this name answers with NaN from its so many-th batch on."""
    plain, seen = HashJudge._score_batch, []

    def score(self: HashJudge, texts: list[str]) -> np.ndarray:
        seen.extend([1] * (self.name == name))
        return np.full(len(texts), np.nan) if len(seen) > after else plain(self, texts)

    monkeypatch.setattr(HashJudge, "_score_batch", score)


def test_a_judge_that_fails_on_pairs_costs_no_sampling_again(go, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as broken:
        breaks_for(broken, "other", 1)
        with pytest.raises(PolicyPatchError, match=r"judge other: completion .* scored nan.*, row \d+\)") as caught:
            go("toxicity")
    assert "\n" not in str(caught.value)
    go("toxicity")
    cache = json.loads((tmp_path / "run" / "run.json").read_text())["cache"]
    assert cache["completions"] == {"hits": 1, "misses": 3}  # the pairs' are there, the arms' are made
    assert cache["pairs"] == {"hits": 0, "misses": 1}


def test_a_judge_that_fails_in_the_evaluation_costs_neither_training_nor_sampling_again(go, tmp_path, monkeypatch):
    """svm is asked once before the run; its second batch are the base's continuations, the fourth the sft arm's."""
    from policypatch.train.dpo_module import DPOModule
    from policypatch.train.sft_module import SFTModule

    expected = go("toxicity", "whole", others="all")
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "another"))
    with monkeypatch.context() as broken:
        breaks_for(broken, "svm", 3)
        with pytest.raises(PolicyPatchError, match="judge svm"):
            go("toxicity", others="all")
    assert Scorecard.load(tmp_path / "run" / "scorecard.json") == []  # no probe was done with
    assert not (tmp_path / "run" / "patch").exists()
    for stage in (SFTModule, DPOModule):
        monkeypatch.setattr(stage, "training_step", lambda *_: pytest.fail("was trained"))
    assert without_costs(go("toxicity", others="all")) == without_costs(expected)
    cache = json.loads((tmp_path / "run" / "run.json").read_text())["cache"]
    assert cache["pairs"] == {"hits": 1, "misses": 0}
    assert cache["completions"]["hits"] >= 2  # base and sft
    assert cache["judgements"]["hits"] >= 2


def test_texts_that_a_judge_fails_on_are_marked_and_the_run_goes_on(go, tmp_path: Path, monkeypatch):
    """About one text in forty, no prompt (they end in a number) among them."""
    plain = HashJudge._score_batch

    def score(self: HashJudge, texts: list[str]) -> np.ndarray:
        scores = plain(self, texts)
        if self.name == "svm" and any(
            score < 0.025 and not text[-1].isdigit() for text, score in zip(texts, scores, strict=True)
        ):
            raise ValueError("a text like that")
        return scores

    monkeypatch.setattr(HashJudge, "_score_batch", score)
    card = go("toxicity", evaluate__k=20)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    left_out = sum(sample["scores"]["svm"] is None for sample in samples if sample["arm"] == "base")
    assert left_out and not any(sample["scores"]["other"] is None for sample in samples)
    assert card.find(arm="base", split="rtp", judge="svm", metric="amt").unjudged == left_out
    assert card.find(arm="base", split="rtp", judge="other", metric="amt").unjudged == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The judge svm failed on" in page


def test_a_judge_of_another_risk_that_fails_leaves_the_own_figures(go, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as broken:
        breaks_for(broken, "words", 1)
        with pytest.raises(PolicyPatchError, match="judge words"):
            go("toxicity", others="all")
    left = Scorecard.load(tmp_path / "run" / "scorecard.json")
    assert {row.risk for row in left} == {"toxicity"}
    assert [row for row in go("toxicity", others="all") if row.risk == "toxicity"] == left


def test_a_request_longer_than_what_is_trained_on_costs_no_pairs_again(go, tmp_path: Path):
    """A chat cannot be cut; with room for it the pairs are those that were made."""
    with pytest.raises(PolicyPatchError, match=r"data\.max_prompt_tokens \(20\)") as caught:
        go("harmfulness", **{"data.max_prompt_tokens": 20})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.ckpt"))
    go("harmfulness", "again")
    cache = json.loads((tmp_path / "again" / "run.json").read_text())["cache"]
    assert cache["pairs"] == {"hits": 1, "misses": 0}


def test_a_filter_that_no_pair_passes_is_said_and_another_needs_no_sampling(go, tmp_path: Path):
    """Benign rows alone are nothing to train a risk on."""
    none = "{margin:1.0,chosen_at_most:0.4,rejected_at_least:0.5,min_tokens:2,max_repetition:0.5}"
    with pytest.raises(PolicyPatchError, match=r"no pair passed teacher\.filter") as caught:
        go("harmfulness", **{"teacher.filter": none})
    assert "\n" not in str(caught.value)
    go("harmfulness", "again")
    cache = json.loads((tmp_path / "again" / "run.json").read_text())["cache"]
    assert cache["completions"]["hits"] == 5  # prompts and benign prompts, guided and not, and benign texts


def test_a_checkout_that_is_not_installed_is_told_before_anything_is_made(go, monkeypatch, tmp_path):
    def version(name: str) -> str:
        if name == "policypatch":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("policypatch.patch.lineage.version", version)
    with pytest.raises(PolicyPatchError, match=r"^policypatch is not installed, .*: pip install -e "):
        go("toxicity")
    assert not (tmp_path / "run" / "pairs.jsonl").exists()
