"""The peak of a part of a run is that part's own."""

import torch

from policypatch.train import memory
from policypatch.train.memory import peak_memory

CPU, MEGA = torch.device("cpu"), 2**20


def test_what_is_held_within_the_block_counts_and_what_was_held_before_does_not():
    held = torch.ones(300 * MEGA // 4)
    del held
    with peak_memory(CPU) as little:
        pass
    with peak_memory(CPU) as much:
        held = torch.ones(200 * MEGA // 4)
        del held
    assert 150 * MEGA < much.bytes - little.bytes < 260 * MEGA


def test_without_proc_it_is_the_processs_peak_so_far(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "nowhere")
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes > 50 * MEGA
