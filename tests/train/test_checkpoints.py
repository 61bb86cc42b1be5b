"""A checkpoint that a disk has damaged is told from one that it has not."""

from pathlib import Path
from random import Random

import pytest
import torch

from policypatch.train.checkpoints import usable


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({"state_dict": {"patch": torch.arange(64.0)}, "step": 3}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_whole_one_is_usable_and_none_is_not(checkpoint: Path, tmp_path: Path):
    assert usable(checkpoint) and checkpoint.is_file()
    assert not usable(tmp_path / "nowhere.ckpt")


def test_whatever_damage_ends_in_false_and_not_in_another_patch(checkpoint: Path):
    """Bits and bytes anywhere, its directory of names above all, and files that were cut."""
    draw, whole, found = Random(0), checkpoint.read_bytes(), 0
    for number in range(600):
        content = bytearray(whole)
        if number % 3 == 0:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif number % 3 == 1:
            content = content[: draw.randrange(len(content))]
        else:
            for _ in range(20):
                content[-1 - draw.randrange(400)] = draw.randrange(256)
        checkpoint.write_bytes(content)
        if usable(checkpoint):
            assert torch.equal(torch.load(checkpoint, weights_only=True)["state_dict"]["patch"], torch.arange(64.0))
        else:
            found += not checkpoint.exists()
    assert found > 500


def test_one_that_cannot_be_read_now_is_kept(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(OSError, match="Input/output"):
        usable(checkpoint)
    assert checkpoint.is_file()
