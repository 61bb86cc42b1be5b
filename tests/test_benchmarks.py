"""What the benchmark compares is the same work: TRL with PEFT trains a tiny base to the losses that ours does."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT

from policypatch.files.atomic import read_json
from policypatch.model.base import Base
from policypatch.model.load import load_base

sys.path.insert(0, str(ROOT))
from benchmarks import plan
from benchmarks.bases import shaped_base
from benchmarks.decoding import overhead, sampling
from benchmarks.figure import draw_growth
from benchmarks.floor import operations
from benchmarks.ours import Ours
from benchmarks.shapes import SHAPES, SMOLLM2, Shape
from benchmarks.tables import amounts, own_growth, quoted, show
from benchmarks.theirs import Theirs
from benchmarks.timing import bracketed, in_turn
from benchmarks.training import GROWTH, agreed, agreement, doubled, followed, growth, missed, stage
from benchmarks.workload import Workload

WORK = Workload(pairs=3, prompt=8, completion=5, patch=4)


@pytest.fixture
def load(tiny_base_folder: Path):
    from omegaconf import OmegaConf

    options = {"name": "tiny", "path": str(tiny_base_folder), "source": None, "dtype": "float32", "device": "cpu"}
    return lambda: load_base(OmegaConf.create(options | {"attention": "sdpa", "quantize": None}))


@pytest.mark.parametrize(("stage", "options"), [("sft", {}), ("dpo", {}), ("dpo", {"precomputed": True})])
def test_both_sides_compute_the_same(stage: str, options: dict, load):
    ours, theirs = Ours(load(), WORK, stage, 4), Theirs(load(), WORK, stage, 4, **options)
    before = ours.vectors.detach().clone()
    assert max(agreement(ours, theirs).values()) < 1e-4
    assert followed(ours, theirs, 20) < 1e-3
    assert not torch.equal(ours.vectors, before)
    torch.testing.assert_close(ours.vectors, theirs.vectors, rtol=1e-2, atol=1e-3)


def test_a_base_of_a_shape_has_its_weights_and_is_asked_like_any_other():
    shape = Shape("tiny", 2, 64, 96, 32, 500, head=16)
    base = shaped_base(shape, "float32")
    norms = (2 * shape.layers + 1) * shape.width
    assert base.model.num_parameters() == shape.layers * shape.layer + shape.whole + norms
    assert len(base.tokenizer) == len(base.embedding) == 500
    sides = [side(base, WORK, "dpo", 2) for side in (Ours, partial(Theirs, checkpointing=False))]
    assert max(agreement(*sides).values()) < 1e-4
    again = shaped_base(shape, "float32", layers=1)
    assert again.model.config.num_hidden_layers == 1
    assert sampling(base, 1, new_tokens=3)["ratio"]["median"] > 0


def test_sides_that_share_a_base_compute_what_they_do_alone(load):
    """The bench holds two bases, not one for each side."""
    base, checkpointed = load(), load()
    alone = [Ours(load(), WORK, "dpo", 2).step(), Theirs(load(), WORK, "dpo", 2).step()]
    sides = [Ours(base, WORK, "dpo", 2), Theirs(checkpointed, WORK, "dpo", 2)]
    sides += [
        Theirs(of, WORK, "dpo", 2, precomputed, of is checkpointed)
        for of in (base, checkpointed)
        for precomputed in (False, True)
    ]
    assert [side.step() for side in sides] == pytest.approx([*alone, *[alone[1]] * 4], abs=1e-5)


def test_operations_by_hand(load):
    base: Base = load()
    ours = Ours(base, WORK, "dpo")
    tree = ours.batch().tree
    width, hidden, layers, words = 64, base.model.config.intermediate_size, 3, base.embedding.shape[0]
    layer = width * (width + 32 + 32 + width) + 3 * width * hidden  # two key-value heads for four
    tokens = 4 + tree.tokens - tree.padding
    assert operations(base.model, tree, 4) == 4 * (tokens * layers * layer + 3 * 2 * 5 * words * width)


def test_ours_stands_before_and_after_everything(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, int]] = []
    clock = iter([9, 9, 9, 9, 9, 1, 6, 3, 10, 1, 3, 8, 5, 5, 5])

    def timed(function) -> float:
        function()
        return float(next(clock))

    monkeypatch.setattr("benchmarks.timing.timed", timed)
    others = {name: partial(lambda name, turn: calls.append((name, turn)), name) for name in "ab"}
    own, seconds, ratios = bracketed(lambda turn: calls.append(("ours", turn)), others, 2)
    assert calls == [(name, turn) for turn in range(3) for name in ("ours", "a", "ours", "b", "ours")]
    assert own == [[1, 3, 1], [3, 5, 5]] and seconds == {"a": [6, 8], "b": [10, 5]}
    assert ratios == {"a": [6 / 2, 8 / 4], "b": [10 / 2, 5 / 5]}


def test_sizes_are_timed_in_turn():
    calls: list[str] = []
    seconds = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "b", "a"] and [len(of) for of in seconds.values()] == [2, 2]


def test_the_products_of_both_sides_are_compared_in_float64(load):
    base = doubled(load)
    assert {p.dtype for p in base.model.parameters()} == {torch.float64}
    found = agreed(load, WORK, "dpo")
    assert [*found] == ["float64", "float32"] and [*found["float64"]] == [*found["float32"]]
    assert found["float64"]["loss_over_20_steps"] < 1e-4 and max(found["float32"].values()) < 1e-3
    assert missed({"dpo": found}) == []


@pytest.mark.parametrize("broken", [lambda loss: loss + 0.01, lambda loss: loss * float("nan")])
def test_sides_that_disagree_are_not_timed(broken, load, monkeypatch: pytest.MonkeyPatch):
    loss_of = Theirs.loss_of
    monkeypatch.setattr(Theirs, "loss_of", lambda self, batch: broken(loss_of(self, batch)))
    with pytest.raises(SystemExit, match="disagree in float64"):
        agreed(load, WORK, "sft")


def test_what_rounding_makes_of_twenty_steps_is_told_and_what_it_makes_of_the_first_is_bound(load, monkeypatch):
    far = {torch.float64: 0.0, torch.float32: 0.01}
    monkeypatch.setattr("benchmarks.training.followed", lambda ours, _: far[ours.module.backbone.model.dtype])
    found = agreed(load, WORK, "sft")
    assert found["float32"]["loss_over_20_steps"] == 0.01
    assert missed({"sft": found}) == ["sft: losses over 20 steps in float32 are 1.0e-02 from TRL's, the aim is 1e-03"]
    monkeypatch.setattr(
        "benchmarks.training.agreement", lambda ours, _: {"loss": far[ours.module.backbone.model.dtype]}
    )
    with pytest.raises(SystemExit, match="disagree in float32"):
        agreed(load, WORK, "sft")


def test_every_side_of_a_stage_is_timed(load, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.training.can_compile", lambda device: False)  # which takes half a minute
    found = stage(load, WORK, "dpo", 2)
    theirs = {"trl", "trl_precomputed", "trl_without_checkpointing", "trl_precomputed_without_checkpointing"}
    assert set(found["ratio"]) == theirs and set(found["seconds"]) == {"ours", *theirs}
    assert found["floor_share"]["max"] > 0 and found["tokens"]["min"] > WORK.patch
    assert max(found["agreement"].values()) < 1e-4


def test_a_step_is_timed_as_its_parts_grow(load, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.training.GROWTH", dict.fromkeys(GROWTH, (1, 4)))
    found = growth(load, WORK, 1)
    assert set(found) == {"pairs", "prompt", "completion", "patch"}
    assert found["patch"]["4"]["tokens"] - found["patch"]["1"]["tokens"] == 3


def test_what_a_vector_costs_by_hand():
    """A second for 99 vectors more; a token of the usual step takes 2 / 200 of one: 1 / 99 to 1 / 100."""
    sizes = {
        size: {"seconds": {"median": seconds}, "tokens": tokens}
        for size, seconds, tokens in (("1", 1.5, 151), ("50", 2.0, 200), ("100", 2.5, 250))
    }
    assert own_growth(sizes) == pytest.approx(100 / 99)


def test_the_newest_results_have_what_is_quoted():
    newest = read_json(ROOT / "benchmarks" / "results" / "latest.json")
    stages = ("step_ratio_vs_trl", "floor_share", "peak_memory_ratio")
    named = [f"{stage}.{name}" for stage in ("sft", "dpo") for name in stages]
    named += ["dpo.step_ratio_vs_trl_precomputed", "decode.sampling_ratio_vs_generate"]
    named += [f"decode.overhead_{way}" for way in ("patched", "peft", "lora_unmerged", "lora_merged")]
    for name in named:
        assert 0 < newest[name]["min"] <= newest[name]["median"] <= newest[name]["max"]


def test_every_way_of_answering_is_timed(load):
    found = overhead(load, 1, new_tokens=4)
    assert set(found) == {"plain", "patched", "peft", "lora_unmerged", "lora_merged"}
    assert all(of["per_token"]["median"] > 0 for of in found.values())
    assert found["patched"]["per_token_vs_peft"]["median"] > 0
    assert sampling(load(), 1, new_tokens=3)["ratio"]["median"] > 0


def test_what_was_found_is_quoted_and_shown(capsys: pytest.CaptureFixture):
    one, two = ({"median": x, "min": x, "max": x} for x in (1.0, 2.0))
    stage = {"seconds": {"ours": one, "trl": two}, "ratio": {"trl": two}, "floor_s": one, "floor_share": one}
    stage |= {"tokens_per_s": one, "padding_share": 0.25}
    ways = {name: {"first_token": one, "per_token": two, "seconds_per_token": one} for name in ("plain", "patched")}
    found = {
        "sft": stage,
        "peak_bytes": {name: {"ours": 1e9, "trl": 4e9} for name in ("sft", "dpo")},
        "overhead": ways,
        "sampling": {"ours_tokens_per_s": two, "generate_tokens_per_s": one, "ratio": two},
    }
    assert {name: of["median"] for name, of in quoted(found).items()} == {
        "sft.step_ratio_vs_trl": 2,
        "sft.floor_share": 1,
        "sft.peak_memory_ratio": 0.25,
        "dpo.peak_memory_ratio": 0.25,
        "decode.overhead_patched": 2,
        "decode.first_token_patched": 1,
        "decode.sampling_ratio_vs_generate": 2,
    }
    shown = {name: of["median"] for name, of in amounts(found).items()}
    assert shown["sft, a step, trl, s"] == 2 and shown["sft, padding of the tokens read, %"] == 25
    assert shown["dpo, most memory, trl, GB"] == 4 and shown["an answer's token, patched, ms"] == 1000
    assert shown["sampling, tokens a second, ours"] == 2
    show(amounts(found), "a bench")
    assert "an answer's token, patched, ms" in capsys.readouterr().out


def test_no_side_holds_the_packages_of_the_other():
    """What a process takes is its own."""
    code = "import sys, benchmarks.memory, benchmarks.{}; sys.exit(' '.join({} & sys.modules.keys()) or 0)"
    for side, others in (("ours", {"trl", "peft"}), ("theirs", {"lightning"})):
        done = subprocess.run([sys.executable, "-c", code.format(side, others)], cwd=ROOT, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr


def test_growth_is_drawn(tmp_path: Path):
    spread = {"median": 1.0, "min": 0.5, "max": 2.0}
    sizes = {size: {"seconds": spread, "floor_s": 0.4} for size in ("1", "10")}
    sizes |= {"50": {"seconds": spread, "floor_s": 0.4, "tokens": 100}}
    draw_growth({"pairs": sizes, "patch": sizes}, tmp_path / "growth.svg")
    assert ET.parse(tmp_path / "growth.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("7B", 6_738_415_616), ("13B", 13_015_864_320), ("70B", 68_976_648_192), ("SmolLM2-135M", 134_515_008)],
)
def test_the_plan_knows_the_bases_but_for_their_norms(shape: str, parameters: int):
    of = next(s for s in (*SHAPES, SMOLLM2) if s.name == shape)
    norms = (2 * of.layers + 1) * of.width
    assert of.layers * of.layer + of.whole + norms == parameters


def test_the_plan_of_a_small_run_by_hand():
    """Two layers of width 4 (keys 2, inner 8): 4 x (8 + 4 + 24) = 144 weights each, 10 words untied: 80 more."""
    of = Shape("tiny", 2, 4, 8, 2, 10)
    machine = plan.Machine(rate=100.0, reads=1e9, collects=(10.0, 1.0), memory=1e9, call=0.0)
    work = Workload(pairs=2, prompt=3, completion=5, patch=4)
    assert (of.layer, of.whole) == (144, 80)
    assert plan.weights(of, machine, 1) == 2 * (288 + 80)
    assert plan.weights(of, machine, 2) == 2 * (144 + 288 + 80)  # its half, and two layers whole
    # 4 + 2 x 13 = 30 tokens leave 2 x 4 x 4 + 2 x (16 + 24) = 112 bytes in each of two layers.
    assert plan.step_memory(of, machine, work) == 2 * 368 + 30 * 2 * 112
    # 4 x (30 x 288 + 20 x 40) operations; on two ranks 4 x ((4 + 13) x 288 + 10 x 40), or collecting both ways.
    assert plan.step_seconds(of, machine, work, 2, 1) == pytest.approx(4 * (30 * 288 + 20 * 40) / 100)
    assert plan.step_seconds(of, machine, work, 2, 2) == pytest.approx(4 * (17 * 288 + 10 * 40) / 100)
    assert plan.collecting(of, machine, 2) == pytest.approx(2 * 288 / 2 / 10)
    assert plan.collecting(of, machine, 16) == pytest.approx(2 * 288 * 15 / 16 / 1)
    assert plan.collecting(of, machine, 1) == 0
