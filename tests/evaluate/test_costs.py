"""Costs: counts by hand, bytes as files have them, and ratios of times that are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from policypatch.evaluate import costs
from policypatch.evaluate.costs import Training, latency_rows, shipped, size_rows
from policypatch.evaluate.scorecard import COST, Row
from policypatch.files.cache import counters, reset_counters
from policypatch.model import decode, latency
from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.model.form import Guidance
from policypatch.model.latency import Load, ratios
from policypatch.model.load import load_base
from policypatch.model.lora import LoRA, LoRASettings
from policypatch.model.sampling import Sampling

LOADS = [Load(4, 1), Load(6, 2)]


def patch(base: Base, length: int = 3) -> Arm:
    return Arm("patch", torch.zeros(length, base.width))


@pytest.fixture
def adapters(tiny_base: Base):
    lora = LoRA(tiny_base, LoRASettings(2, 4.0), seed=0)
    yield Arm("lora", lora=lora.state())
    lora.remove()


def figures(rows: list[Row]) -> dict[str, float]:
    assert {row.risk for row in rows} == {COST}
    return {row.metric: row.value for row in rows}


def test_a_patch_is_counted(tiny_base: Base):
    """3 vectors of width 64; training took 90 s on 2 devices, 0.05 device-hours."""
    own = sum(p.numel() for p in tiny_base.model.parameters())
    found = figures(size_rows(patch(tiny_base), tiny_base, Training(90.0, 180.0, 10**9)))
    assert found == {
        "trainable_parameters": 192,
        "parameter_share": 192 / own,
        "artifact_bytes": shipped(patch(tiny_base)),
        "train_seconds": 90.0,
        "device_hours": 0.05,
        "peak_memory_bytes": 10**9,
    }


def test_adapters_are_counted_and_are_no_part_of_the_base(adapters: Arm, tiny_base: Base):
    """Rank 2 on q and o (64 x 64), k and v (64 x 32), gate and up (64 x 96) and down (96 x 64) of 3 blocks."""
    by_hand = 3 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    own = sum(p.numel() for name, p in tiny_base.model.named_parameters() if "lora_" not in name)
    found = figures(size_rows(adapters, tiny_base, None))
    assert found["trainable_parameters"] == by_hand
    assert found["parameter_share"] == pytest.approx(by_hand / own)
    assert "train_seconds" not in found


def test_bytes_are_those_of_the_file(tiny_base: Base, adapters: Arm, tmp_path: Path):
    save_file({"prompt_embeddings": torch.zeros(3, tiny_base.width)}, tmp_path / "a.safetensors")
    assert shipped(patch(tiny_base)) == (tmp_path / "a.safetensors").stat().st_size
    written = adapters.lora.save(tmp_path / "peft") / "adapter_model.safetensors"
    assert shipped(adapters) == pytest.approx(written.stat().st_size, rel=0.05)  # names differ in length
    assert shipped(Arm("prompt", guidance=Guidance(before="Kindly: "))) == 0


def test_ratios_are_arm_over_base_in_turn(tiny_base: Base, monkeypatch):
    """A clock under which a forward of n tokens takes n seconds: 4 prompt tokens, 3 vectors before them.

    To the first token the arm takes 3 + 4 and the base 4; each further token takes both 1.
    """
    now = [0.0]
    forward = decode._forward

    def timed(model, embeddings, *rest):
        now[0] += embeddings.shape[1]
        return forward(model, embeddings, *rest)

    monkeypatch.setattr(decode, "_forward", timed)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    found = ratios(tiny_base, patch(tiny_base), Load(4, 1), repeats=2)
    np.testing.assert_allclose(found, [[7 / 4, 1], [7 / 4, 1]])


def test_each_answer_comes_after_one_to_a_single_prompt(tiny_base: Base, monkeypatch):
    asked = []
    answer = latency.sample
    monkeypatch.setattr(
        latency, "sample", lambda m, prompts, *a, **k: asked.append(len(prompts)) or answer(m, prompts, *a, **k)
    )
    ratios(tiny_base, patch(tiny_base), Load(4, 3), repeats=1)
    assert asked == [1, 3] * 4


def test_a_single_prompt_is_read_in_one_pass(tiny_base: Base, monkeypatch):
    """A second one, for what several prompts would share, would be timed as the base's first token."""
    widths = []
    forward = decode._forward
    monkeypatch.setattr(decode, "_forward", lambda m, e, *rest: widths.append(e.shape[1]) or forward(m, e, *rest))
    greedy = Sampling(temperature=0.0, max_new_tokens=3)
    decode.sample(tiny_base.model, [[5, 6, 7, 8]], sampling=greedy)
    decode.sample(tiny_base.model, [[5, 6, 7, 8]], torch.ones(3, tiny_base.width), sampling=greedy)
    assert widths == [4, 1, 1, 7, 1, 1]


def test_adapters_are_timed_in_the_precision_of_the_base(tiny_base_folder: Path, monkeypatch):
    options = {"revision": None, "dtype": "bfloat16", "device": "cpu", "attention": "sdpa", "quantize": None}
    base = load_base(OmegaConf.create({"name": "tiny", "source": None, "path": str(tiny_base_folder), **options}))
    lora = LoRA(base, LoRASettings(2, 4), 0)
    before = {name: p.detach().clone() for name, p in lora.parameters.items()}
    seen = {}

    def look(base, prompts, arm):
        seen[arm.name] = {p.dtype for p in lora.parameters.values()}
        return np.ones(2)

    monkeypatch.setattr(latency, "_seconds", look)
    ratios(base, Arm("lora", lora=lora.state()), Load(4, 1), 1)
    assert seen["lora"] == {torch.bfloat16}
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in lora.parameters.items())


def test_a_safety_prompt_is_read_as_well(tiny_base: Base, monkeypatch):
    asked = []
    monkeypatch.setattr(latency, "_seconds", lambda base, prompts, arm: asked.append(prompts) or np.ones(2))
    ratios(tiny_base, Arm("prompt", guidance=Guidance("Be kind.")), Load(4, 2), repeats=1)
    plain, told = asked[:2]
    assert asked[2:] == [told, plain]  # which of the two comes first changes
    before = tiny_base.encode("Be kind.")
    assert told == [[*before, *prompt] for prompt in plain]
    assert [len(prompt) for prompt in plain] == [4, 4] and plain[0] != plain[1]


def test_the_base_is_timed_without_adapters_in_its_layers(adapters: Arm, tiny_base: Base, monkeypatch):
    """What is merged is timed without them, too."""
    seen = []

    def look(base, prompts, arm):
        seen.append((arm.name, any("lora_" in name for name, _ in base.model.named_parameters())))
        return np.ones(2)

    monkeypatch.setattr(latency, "_seconds", look)
    ratios(tiny_base, adapters, Load(4, 1), 1)
    assert set(seen) == {("lora", True), ("base", False)}
    seen.clear()
    ratios(tiny_base, adapters, Load(4, 1), 1, merged=True)
    assert set(seen) == {("lora", False), ("base", False)}
    assert any("lora_" in name for name, _ in tiny_base.model.named_parameters())  # and they are back


def test_rows_hold_median_and_quartiles(tiny_base: Base, adapters: Arm, monkeypatch):
    monkeypatch.setattr(
        costs, "ratios", lambda *_: np.array([[1.0, 2.0], [1.1, 2.2], [1.4, 2.8], [1.2, 2.0], [1.3, 2]])
    )
    rows = latency_rows(adapters, tiny_base, LOADS, 5)
    assert [(row.split, row.metric) for row in rows] == [
        (load, metric + merged)
        for load in ("4x1", "6x2")
        for merged in ("", "_merged")
        for metric in ("first_token_ratio", "per_token_ratio")
    ]
    assert (rows[0].value, rows[0].low, rows[0].high, rows[0].n) == pytest.approx((1.2, 1.1, 1.3, 5))


def test_arms_of_one_shape_are_timed_once(tiny_base: Base):
    reset_counters()
    latency_rows(patch(tiny_base), tiny_base, LOADS, 1)
    latency_rows(Arm("another", torch.ones(3, tiny_base.width)), tiny_base, LOADS, 1)
    assert counters()["latency"] == {"hits": 2, "misses": 2}
    latency_rows(patch(tiny_base, 4), tiny_base, LOADS, 1)
    assert counters()["latency"] == {"hits": 2, "misses": 4}


@pytest.mark.parametrize("best_of", [1, 2])
def test_what_stands_in_the_bases_place_is_not_timed(best_of: int, tiny_base: Base):
    other = None if best_of > 1 else tiny_base
    assert latency_rows(Arm("teacher", other=other, best_of=best_of), tiny_base, LOADS, 1) == []
