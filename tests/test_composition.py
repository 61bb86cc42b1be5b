"""The search for a stack: what it begins with, that it finds what is best, and what it says."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny_run import overrides, patch_of
from typer.testing import CliRunner

from policypatch.cli import app
from policypatch.composition import Aim, Candidate, Tried, asked, best, hand_made, pareto, search
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.probes import BenignKLProbe, CrowsPairsProbe, NextWordProbe, TextPerplexityProbe, half
from policypatch.model.base import Base
from policypatch.patch.artifact import load, save


def test_all_orders_of_all_subsets_of_three_and_less_of_more():
    three = [candidate.order for candidate in hand_made(3)]
    assert len(three) == 15 == len(set(three)) and three[0] == (0, 1, 2) and (2,) in three and (2, 0) in three
    four = [candidate.order for candidate in hand_made(4)]
    assert four[:2] == [(0, 1, 2, 3), (3, 2, 1, 0)] and len(four) == 2 + 4 + 6
    assert all(scale == 1 for candidate in hand_made(3) for scale in candidate.scales)


def test_a_search_tries_what_a_hand_would_and_then_finds_better():
    """The best is patch 1 at 0.7 before patch 0 at 1.2: no stack of strength 1 reaches it."""

    def measure(candidate: Candidate) -> tuple[float, ...]:
        strength = dict(zip(candidate.order, candidate.scales, strict=True))
        right_order = candidate.order == (1, 0)
        return (abs(strength.get(1, 0) - 0.7) + abs(strength.get(0, 0) - 1.2) + (not right_order),)

    tried = search(2, measure, 1, 50, seed=0)
    assert 25 <= len(tried) == len({one.candidate for one in tried}) <= 50
    assert [one.candidate for one in tried[:4]] == hand_made(2)
    hand = min(one.values[0] for one in tried[:4])
    assert hand == pytest.approx(0.5)
    assert best(tried, (1.0,)).values[0] < 0.25
    assert [one.values for one in search(2, measure, 1, 12, seed=5)] == [
        one.values for one in search(2, measure, 1, 12, seed=5)
    ]


def test_a_search_of_orders_alone_ends_when_there_are_no_more():
    tried = search(2, lambda candidate: (float(len(candidate.order)),), 1, 50, seed=0, scaled=False)
    assert {one.candidate for one in tried} == set(hand_made(2))


def test_pareto_and_the_best_by_hand():
    """(1, 4) and (2, 2) are beaten by none; (2, 4) is by both. Shares of a base of (4, 8): 0.75, 0.75 and 0.5, 0.25."""
    one, two, three = (Tried(Candidate((i,), (1.0,)), v) for i, v in enumerate([(1.0, 4.0), (2.0, 2.0), (2.0, 4.0)]))
    assert pareto([one, two, three]) == [one, two]
    assert best([one, two, three], (4.0, 8.0)) is one or best([one, two, three], (4.0, 8.0)) is two
    assert best([one, two, three], (4.0, 1.0)) is two
    assert best([one, two, three], (1.0, 80.0)) is one
    assert best([one, two], (4.0, 0.0)) is two  # a base of 0 (KL to itself): the largest is the measure


def test_vectors_stand_in_their_order_and_strength(tiny_base: Base):
    patches = [patch_of(tiny_base, "tox", 4, 2), patch_of(tiny_base, "bias", 20, 3)]
    candidate = Candidate((1, 0), (0.5, 1.0))
    expected = torch.cat([0.5 * patches[1].vectors, patches[0].vectors])
    assert torch.equal(candidate.vectors(patches), expected)
    assert candidate.named(patches) == "0.5 bias + tox"
    assert candidate.named([patches[0], patches[0]]) == "0.5 tox#2 + tox#1"


@pytest.mark.parametrize(
    "probe",
    [
        BenignKLProbe("benign", ["a", "b", "c"]),
        TextPerplexityProbe("wiki", ["a", "b", "c"]),
        NextWordProbe("work", ["a", "b", "c"], ["he"], ["she"]),
        CrowsPairsProbe("crows", ["a", "b", "c"], ["x", "y", "z"]),
    ],
)
def test_halves_share_nothing_and_are_all(probe):
    first, second = (half(probe, which) for which in (0, 1))
    for name in ("prompts", "more", "less"):
        if hasattr(probe, name):
            whole = list(getattr(probe, name))
            assert list(getattr(first, name)) == whole[::2] and list(getattr(second, name)) == whole[1::2]


def test_an_aim_that_nothing_measures_is_told_with_those_there_are():
    probes = [BenignKLProbe("benign", ["a", "b"])]
    assert asked(Aim.read("utility.kl_benign"), probes, []).judge is None
    with pytest.raises(
        PolicyPatchError, match=r"toxicity\.amt is measured by nothing here: choose from utility\.kl_benign"
    ):
        asked(Aim.read("toxicity.amt"), probes, [])
    with pytest.raises(PolicyPatchError, match=r"give RISK\.METRIC"):
        Aim.read("toxicity")


@dataclass(frozen=True)
class Judged:
    """A probe whose judges are these."""

    judges: dict[str, None]
    risk: str = "gender_bias"
    metrics: tuple[str, ...] = ("gas",)
    prompts: tuple[str, ...] = ("a", "b")


@pytest.mark.parametrize(
    ("filters", "marked", "judge"),
    [
        ([], [], "words"),
        (["words"], ["words"], "names"),
        (["words"], ["words", "names"], "third"),
        (
            ["words", "third"],
            ["words", "names", "third"],
            "names",
        ),  # it shares words with the filter, but chose nothing
        (["words", "names", "third"], ["words", "names", "third"], "words"),
    ],
)
def test_the_judge_that_had_the_least_part_in_training_speaks(filters: list[str], marked: list[str], judge: str):
    probe = Judged(dict.fromkeys(("words", "names", "third")))
    assert asked(Aim("gender_bias", "gas"), [probe], filters, marked).judge == judge


@pytest.fixture
def compose(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "cache"))
    own = ("risk.", "~risk", "+risk", "others.", "~others", "+others", "evaluate.", "decode_rows")
    settings = [o for o in overrides(tiny_base_folder, tmp_path, others="all") if o.startswith(own)]
    settings = [o for o in settings if not o.startswith(("evaluate.prompts", "evaluate.other_prompts"))]
    settings += ["model.dtype=float32"]

    def call(*arguments: object):
        chosen = [word for setting in settings for word in ("--set", setting)]
        given = ["compose", *map(str, arguments), "--model", str(tiny_base_folder), "--prompts", "6", *chosen]
        return CliRunner().invoke(app, given, env={"COLUMNS": "100"})

    return call


def test_the_command_writes_the_stack_that_served_best_and_how_it_was_found(compose, tiny_base: Base, tmp_path: Path):
    for name, start in (("tox", 4), ("bias", 20)):
        save(patch_of(tiny_base, name, start), tmp_path / name)
    result = compose(tmp_path / "tox", tmp_path / "bias", "--out", tmp_path / "both", "--budget", 7)
    assert result.exit_code == 0, result.output
    made = load(tmp_path / "both", tiny_base.identity)
    search_told = made.manifest.training["composition"]
    assert search_told["objectives"] == ["toxicity.toxic_rate", "utility.kl_benign"]
    assert len(search_told["tried"]) == 7 and search_told["tried"][0]["candidate"] == "tox + bias"
    assert [parent.name for parent in made.manifest.parents] == search_told["order"]
    parts = {name: load(tmp_path / name).vectors for name in ("tox", "bias")}
    scaled = [scale * parts[name] for name, scale in zip(search_told["order"], search_told["scales"], strict=True)]
    assert torch.equal(made.vectors, torch.cat(scaled))
    assert search_told["caveats"] == []
    assert {(row["arm"], row["metric"], row["n"]) for row in made.manifest.scorecard} == {
        (arm, metric, 3) for arm in ("base", "stack") for metric in ("toxic_rate", "kl_benign")
    }
    assert "* is written" in result.stdout and "(by hand)" in result.stdout
    assert search_told["best_by_hand"] in {one["candidate"] for one in search_told["tried"][:4]}
    assert [line.split(":")[0] for line in search_told["against_it"]] == search_told["objectives"]
    assert made.manifest.training["evaluate"]["prompts"] == 6
    front = {one["candidate"] for one in search_told["tried"] if one["unbeaten"]}
    assert front and front <= {*search_told["reported"]} - {"base"}  # as many as these are all shown
    assert all(low <= value <= high for of in search_told["reported"].values() for value, low, high in of)


def test_a_judge_that_chose_the_pairs_is_marked_where_no_other_is_there(compose, tiny_base: Base, tmp_path: Path):
    """Of gender bias both had a part: names, which chose nothing, speaks, and the manifest marks it."""
    bias = save(patch_of(tiny_base, "bias", 4, risks=["toxicity", "gender_bias"]), tmp_path / "bias")
    result = compose(bias, "--out", tmp_path / "out", "--budget", 2, "--objective", "gender_bias.gas")
    assert result.exit_code == 0, result.output
    manifest = load(tmp_path / "out").manifest
    assert {(row["judge"], row["filter"]) for row in manifest.scorecard} == {("names", True)}
    told = manifest.training["composition"]
    assert told["judges"] == ["names"] and len(told["caveats"]) == 2
    assert "! gender_bias.gas is by names, which counts what training pairs are chosen by" in result.stdout
    assert "! both halves of gender_bias's prompts are about the same professions" in result.stdout


def test_a_budget_below_what_hands_would_try_is_told(compose, tiny_base: Base, tmp_path: Path):
    """Of two patches these are four: both orders and each alone."""
    folders = [save(patch_of(tiny_base, name, start), tmp_path / name) for name, start in (("tox", 4), ("bias", 20))]
    result = compose(*folders, "--out", tmp_path / "out", "--budget", 3, "--objective", "toxicity.toxic_rate")
    assert result.exit_code == 0 and "! --budget 3 leaves out some of the 4 stacks" in result.stdout


def test_what_cannot_be_composed_is_told_before_anything_is_loaded(compose, tiny_base: Base, tmp_path: Path):
    tox = save(patch_of(tiny_base, "tox", 4), tmp_path / "tox")
    other = replace(tiny_base.identity, weights="0" * 64)
    foreign = save(patch_of(tiny_base, "foreign", 20, base=other), tmp_path / "foreign")
    told = compose(tox, foreign, "--out", tmp_path / "out")
    assert told.exit_code == 2 and "stack patches of one base" in told.stderr and told.stderr.count("\n") == 1
    there = compose(tox, tox, "--out", tmp_path / "tox")
    assert there.exit_code == 2 and "choose another --out" in there.stderr
    unknown = compose(tox, "--out", tmp_path / "out", "--objective", "toxicity.speed")
    assert unknown.exit_code == 2 and "toxicity.toxic_rate" in unknown.stderr
