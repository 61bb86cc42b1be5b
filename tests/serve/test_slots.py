"""Slots hold sequences of different lengths, behind different stacks; each goes on as it would alone."""

import sys
from pathlib import Path

import pytest
import torch

from policypatch.model.backbone import plain_logits
from policypatch.serve.slots import Slots, prefix_cache

PROMPTS = ([5, 6, 7, 20], [9], [30, 31, 32, 33, 34, 35, 36])


@pytest.fixture
def slots(tiny_llama) -> Slots:
    return Slots(tiny_llama, rows=3, context=64)


@torch.no_grad()
def test_ragged_rows_behind_their_own_stacks(slots: Slots, tiny_llama):
    table = tiny_llama.get_input_embeddings().weight
    fronts = [table[:0], table[40:45], table[50:52]]
    whole = [list(prompt) for prompt in PROMPTS]
    for front, tokens in zip(fronts, whole, strict=True):
        logits = slots.enter(prefix_cache(tiny_llama, front) if len(front) else None, tokens)
        torch.testing.assert_close(logits, plain_logits(tiny_llama, front, tokens, [0])[0], rtol=1e-4, atol=1e-4)
    for step in range(3):
        logits = slots.step([60 + step, 70 + step, 80 + step])
        for row, (front, tokens) in enumerate(zip(fronts, whole, strict=True)):
            tokens.append(60 + 10 * row + step)
            theirs = plain_logits(tiny_llama, front, tokens, [0])[0]
            torch.testing.assert_close(logits[row], theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_last_moves_into_a_slot_that_is_given_back(slots: Slots, tiny_llama):
    none = tiny_llama.get_input_embeddings().weight[:0]
    for prompt in PROMPTS:
        slots.enter(None, prompt)
    assert slots.leave(0) == 2 and slots.lengths == [7, 1]
    logits = slots.step([60, 61])
    for row, tokens in enumerate(([*PROMPTS[2], 60], [*PROMPTS[1], 61])):
        torch.testing.assert_close(logits[row], plain_logits(tiny_llama, none, tokens, [0])[0], rtol=1e-4, atol=1e-4)
    assert slots.leave(1) == 1 and slots.leave(0) == 0 and slots.lengths == []


@torch.no_grad()
def test_what_a_slot_held_before_is_not_seen(slots: Slots, tiny_llama):
    slots.enter(None, list(range(10, 60)))
    slots.leave(0)
    logits = slots.enter(None, PROMPTS[0])
    none = tiny_llama.get_input_embeddings().weight[:0]
    torch.testing.assert_close(logits, plain_logits(tiny_llama, none, PROMPTS[0], [0])[0], rtol=1e-4, atol=1e-4)


def test_a_prompt_that_fails_leaves_no_slot_behind(slots: Slots):
    with pytest.raises(IndexError):
        slots.enter(None, [10_000])
    assert slots.lengths == []


@pytest.mark.parametrize("leaving", [0, 1, 2])
@torch.no_grad()
def test_what_nobody_has_read_is_zero(slots: Slots, tiny_llama, leaving: int):
    """A NaN there would get through a mask: 0 x NaN is NaN."""
    for prompt in PROMPTS:
        slots.enter(None, prompt)
    slots.leave(leaving)
    for room in (*slots._keys, *slots._values):
        for row in range(slots.rows):
            assert not room[row, :, slots.lengths[row] if row < len(slots.lengths) else 0 :].any()


@torch.no_grad()
def test_a_row_of_nan_harms_no_other(slots: Slots, tiny_llama):
    none = tiny_llama.get_input_embeddings().weight[:0]
    slots.enter(None, list(range(10, 40)))
    for room in (*slots._keys, *slots._values):
        room[0, :, :30] = torch.nan
    slots.leave(0)
    slots.enter(None, PROMPTS[0]), slots.enter(None, PROMPTS[2])
    for logits, tokens in zip(slots.step([60, 61]), ([*PROMPTS[0], 60], [*PROMPTS[2], 61]), strict=True):
        torch.testing.assert_close(logits, plain_logits(tiny_llama, none, tokens, [0])[0], rtol=1e-4, atol=1e-4)


def resident() -> float:
    """MB of this process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@torch.no_grad()
def test_room_takes_memory_where_it_is_written_to(tiny_llama):
    """Huge pages would take the whole of it with the first tokens: 192 MB."""
    before = resident()
    slots = Slots(tiny_llama, rows=16, context=16384)
    assert sum(room.nbytes for room in (*slots._keys, *slots._values)) == 192 << 20
    for _ in range(16):
        slots.enter(None, PROMPTS[0])
    slots.step([60] * 16)
    assert resident() - before < 32
