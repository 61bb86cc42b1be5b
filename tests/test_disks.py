"""Disks that fill up or may not be written, real ones of a few megabytes: one sentence, and the run goes on later."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_run import ROOT, composed, overrides, without_costs

from policypatch.commands.base import composed as config_of_command
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.scorecard import Scorecard
from policypatch.files.atomic import atomic_path
from policypatch.launch import start
from policypatch.train.checkpoints import WholeFiles

Disk = Callable[..., Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """disk(kilobytes) -> the root of a file system of that size; disk(kilobytes, "ro") of one that is read-only."""
    mounted: list[Path] = []

    def make(kilobytes: int, *options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kilobytes}k", *options]), "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount a small disk, and not in every container")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def grow(place: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], check=True)


@pytest.fixture
def go(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start_run(folder: Path, cache: Path | None = None) -> Scorecard:
        monkeypatch.setenv("POLICYPATCH_CACHE", str(cache or tmp_path / "cache"))
        arguments = overrides(tiny_base_folder, tmp_path)
        start(composed(arguments), folder, "", arguments)
        return Scorecard.load(folder / "scorecard.json")

    return start_run


def test_a_run_whose_disk_fills_up_says_so_and_goes_on_once_there_is_room(go, disk, tmp_path: Path):
    """In the middle of its stages; less and more room (4, 24, 96 kB) end it elsewhere in the same way."""
    expected = without_costs(go(tmp_path / "undisturbed"))
    place = disk(48)
    with pytest.raises(PolicyPatchError, match=r"^no room left on the disk of .*run: .*hydra\.run\.dir=.*goes on$"):
        go(place / "run", tmp_path / "another")
    assert not list((place / "run").rglob(".tmp-*"))
    grow(place, 20_000)
    assert without_costs(go(place / "run", tmp_path / "another")) == expected


def test_a_cache_whose_disk_fills_up_says_so(go, disk, tmp_path: Path):
    expected = without_costs(go(tmp_path / "undisturbed"))
    place = disk(64)
    with pytest.raises(PolicyPatchError, match=r"no room left on the disk of .*POLICYPATCH_CACHE to another folder"):
        go(tmp_path / "run", place / "cache")
    assert not list(place.rglob(".tmp-*"))
    grow(place, 20_000)
    assert without_costs(go(tmp_path / "run", place / "cache")) == expected


def test_a_cache_that_is_read_only_says_so(go, disk, tmp_path: Path):
    with pytest.raises(PolicyPatchError, match=r"^the cache \(POLICYPATCH_CACHE\) is .* cannot be written"):
        go(tmp_path / "run", disk(64, "ro") / "cache")


def test_a_full_disk_is_told_whatever_a_library_says_of_it(disk):
    """torch raises RuntimeError, safetensors an error of its own."""
    import torch
    from safetensors.torch import save_file

    place = disk(64)
    tensor = torch.zeros(100_000)
    with pytest.raises(OSError, match="No space left"):
        WholeFiles().save_checkpoint({"a": tensor}, place / "a.ckpt")
    with pytest.raises(OSError, match="No space left"), atomic_path(place / "a.safetensors") as temporary:
        save_file({"a": tensor}, temporary)
    assert not list(place.iterdir())


@pytest.mark.parametrize("arguments", [["hydra.run.dir={}/out"], ["-m", "seed=0,1", "hydra.sweep.dir={}/out"]])
def test_a_place_that_cannot_be_written_is_told_before_anything_else(arguments: list[str], disk, tmp_path: Path):
    (tmp_path / "file").touch()
    for place, words in ((disk(64, "ro"), "cannot be written"), (tmp_path / "file", "is a file")):
        given = [argument.format(place) for argument in arguments]
        ended = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *given], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: hydra.") and words in ended.stderr and ended.stderr.count("\n") == 1


def test_a_command_that_writes_no_run_asks_for_no_place(disk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(disk(64, "ro"))
    assert config_of_command(["risk=toxicity"]).risk.name == "toxicity"
