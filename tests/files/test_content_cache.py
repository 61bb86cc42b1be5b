import json
import logging
import os
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from policypatch.errors import PolicyPatchError
from policypatch.files import cache, upkeep

# Makes one entry, notes each build in a file, waits halfway for another file, and prints the entry's content.
WORKER = """
import logging, sys, time
from pathlib import Path
from policypatch.files import cache
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
def build(folder):
    with open(sys.argv[1], "a") as file:
        file.write("build\\n")
    (folder / "half").write_text("half")
    while not Path(sys.argv[2]).exists():
        time.sleep(0.02)
    (folder / "value").write_text("made")
print((cache.entry("pairs", "k", build) / "value").read_text())
"""


def start(notes: Path, go: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(notes), str(go)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


class Builder:
    """Writes one file and counts how often it was asked."""

    def __init__(self, content: str = "content") -> None:
        self.content, self.calls = content, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "data.txt").write_text(self.content)


def test_the_root_follows_the_environment(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.cache_root() == own_cache
    monkeypatch.setenv("POLICYPATCH_CACHE", "")
    assert cache.cache_root() == Path.home() / ".cache" / "policypatch"


def test_a_key_depends_on_content_and_not_on_order_or_container() -> None:
    key = cache.content_key(a={"x": 1, "y": [1.5, None, True]}, b="ü")
    assert len(key) == 32
    assert key == cache.content_key(b="ü", a={"y": (1.5, None, True), "x": 1})
    config = OmegaConf.create({"one": 1, "a": {"x": "${one}", "y": [1.5, None, True]}})
    assert key == cache.content_key(b="ü", a=config.a)
    assert key == cache.content_key(b="ü", a={"x": 1, "y": config.a.y})


@pytest.mark.parametrize("other", [2, 1.0, True, "1", None, [1], {"1": 1}])
def test_different_parts_have_different_keys(other: Any) -> None:
    assert cache.content_key(a=1) != cache.content_key(a=other)


@pytest.mark.parametrize(
    "value", [Path("x"), b"x", {1, 2}, object(), float("nan"), {1: "x"}, Enum("E", "A"), [Path("x")]]
)
def test_what_is_no_content_cannot_be_part_of_a_key(value: Any) -> None:
    with pytest.raises(TypeError, match=r"parts\.a"):
        cache.content_key(a=value)


def test_an_entry_is_built_once(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    build = Builder()
    with caplog.at_level(logging.INFO):
        first = cache.entry("pairs", "k", build, about={"risk": "toxicity"})
        second = cache.entry("pairs", "k", build)
    assert first == second == own_cache / "pairs" / "k"
    assert build.calls == 1
    assert [r.message for r in caplog.records] == ["cache miss pairs/k", "cache hit pairs/k"]
    assert cache.counters() == {"pairs": {"hits": 1, "misses": 1}}
    about = json.loads((first / "about.json").read_text())
    assert about["about"] == {"risk": "toxicity"}
    assert about["files"]["sub/data.txt"]["bytes"] == 7
    cache.reset_counters()
    assert cache.counters() == {}


@pytest.mark.parametrize("damage", ["content", "size", "missing", "about missing", "about broken", "about odd"])
def test_a_damaged_entry_is_made_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    build = Builder()
    folder = cache.entry("pairs", "k", build)
    data, about = folder / "sub" / "data.txt", folder / "about.json"
    match damage:
        case "content":
            data.write_text("cOntent")
        case "size":
            data.write_text("content and more")
        case "missing":
            data.unlink()
        case "about missing":
            about.unlink()
        case "about broken":
            about.write_text("{")
        case "about odd":
            about.write_text('{"files": 3}')
    cache.entry("pairs", "k", build)
    assert build.calls == 2
    assert data.read_text() == "content"
    assert any(r.levelname == "WARNING" and "damaged" in r.message for r in caplog.records)
    cache.entry("pairs", "k", build)
    assert build.calls == 2


def test_large_files_are_checked_by_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "DIGEST_LIMIT", 3)
    build = Builder()
    folder = cache.entry("pairs", "k", build)
    (folder / "sub" / "data.txt").write_text("cOntent")
    cache.entry("pairs", "k", build)
    assert build.calls == 1
    (folder / "sub" / "data.txt").write_text("short")
    cache.entry("pairs", "k", build)
    assert build.calls == 2


def test_a_failed_build_leaves_nothing() -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        cache.entry("pairs", "k", build)
    assert upkeep.usage() == [("pairs", 0, 0)]
    assert cache.entry("pairs", "k", Builder()).is_dir()


def test_the_builder_may_not_write_the_caches_own_file() -> None:
    with pytest.raises(ValueError, match=r"about\.json"):
        cache.entry("pairs", "k", lambda folder: (folder / "about.json").write_text("x") and None)


@pytest.mark.parametrize(("kind", "key"), [("..", "k"), ("pairs", "../x"), ("a/b", "k"), ("pairs", ""), ("x", ".k")])
def test_names_cannot_lead_out_of_the_cache(kind: str, key: str) -> None:
    with pytest.raises(ValueError, match="plain name"):
        cache.entry(kind, key, Builder())


def test_two_processes_build_one_entry_once(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    first = start(notes, tmp_path / "go")
    wait_for(notes)
    second = start(notes, tmp_path / "go")
    assert second.stderr is not None
    assert second.stderr.readline() == "waiting for another run that is making pairs/k\n"
    (tmp_path / "go").touch()
    assert first.communicate(timeout=30)[0] == "made\n"
    output, said = second.communicate(timeout=30)
    assert output == "made\n"
    assert said == "cache hit pairs/k\n"
    assert notes.read_text() == "build\n"


def test_a_build_killed_halfway_is_made_again_and_leaves_nothing(own_cache: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    worker = start(notes, tmp_path / "never")
    wait_for(notes)
    assert upkeep.clean() == 0  # it is at work: left alone
    worker.kill()
    worker.communicate()
    assert not (own_cache / "pairs" / "k").exists()
    assert upkeep.usage()[0][1] == 0
    build = Builder()
    cache.entry("pairs", "k", build)  # would wait for ever if the dead process still held the lock
    assert build.calls == 1
    assert [p.name for p in (own_cache / "pairs").iterdir() if p.is_dir()] == ["k"]


def test_clean_removes_what_killed_builds_left(own_cache: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    worker = start(notes, tmp_path / "never")
    wait_for(notes)
    wait_for(next((own_cache / "pairs").glob(".tmp-*")) / "half")
    worker.kill()
    worker.communicate()
    assert upkeep.usage() == [("pairs", 0, 4)]
    assert upkeep.clean() == 4
    assert upkeep.usage() == [("pairs", 0, 0)]


def test_usage_and_clean_by_kind() -> None:
    cache.entry("pairs", "a", Builder("x" * 1000))
    cache.entry("pairs", "b", Builder("x" * 1000))
    kept = cache.entry("models", "c", Builder())
    usage = {kind: (entries, size) for kind, entries, size in upkeep.usage()}
    assert usage["pairs"][0] == 2
    assert usage["pairs"][1] > 2000
    assert upkeep.clean("pairs") == usage["pairs"][1]
    assert upkeep.usage()[1] == ("pairs", 0, 0)
    assert kept.is_dir()
    assert upkeep.clean("nothing of this name") == 0


def test_clean_by_age_goes_by_last_use() -> None:
    old = cache.entry("pairs", "old", Builder())
    used = cache.entry("pairs", "used", Builder())
    month_ago = time.time() - 30 * 86400
    for folder in (old, used):
        os.utime(folder / "about.json", (month_ago, month_ago))
    cache.entry("pairs", "used", Builder())
    assert upkeep.clean(older_than_days=7) > 0
    assert not old.exists()
    assert used.exists()


def test_an_empty_cache_has_no_usage() -> None:
    assert upkeep.usage() == []
    assert upkeep.clean() == 0


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLICYPATCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PolicyPatchError, match="POLICYPATCH_CACHE"):
        cache.entry("pairs", "k", Builder())


def test_a_full_disk_says_so() -> None:
    def build(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(PolicyPatchError, match=r"no room left on the disk of .*POLICYPATCH_CACHE"):
        cache.entry("pairs", "k", build)


def test_many_processes_at_once_build_once(tmp_path: Path) -> None:
    notes, go = tmp_path / "notes", tmp_path / "go"
    go.touch()
    workers = [start(notes, go) for _ in range(4)]
    assert [worker.communicate(timeout=60)[0] for worker in workers] == ["made\n"] * 4
    assert notes.read_text() == "build\n"


def test_what_is_measured_on_an_occasion_is_its_own_and_what_was_fetched_is_not() -> None:
    made: list[str] = []

    def get(kind: str) -> Path:
        def build(folder: Path) -> None:
            with cache.begun(kind, "k", range(2)) as journal:  # what was begun is an occasion's own as well
                assert journal.rows == []
                journal.add([0, 1])
            made.append(kind)
            (folder / "value").write_text(f"{len(made)}")

        return cache.entry(kind, "k", build)

    before = get("judgements"), get("models")
    with cache.occasion("november"):
        now = get("judgements"), get("models")
        assert get("judgements") == now[0] != before[0] and now[1] == before[1]
        with cache.occasion():
            assert get("judgements") not in (now[0], before[0])
        assert get("judgements") == now[0]
    assert (get("judgements"), get("models")) == before
    with cache.occasion("november"):
        assert get("judgements") == now[0]
    assert made == ["judgements", "models", "judgements", "judgements"]
    assert not list(cache.cache_root().rglob(f"{cache.BEGUN}*"))


def test_ranks_of_a_launcher_are_on_one_occasion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.ranks, "gather", lambda own: ["the first one's", own])
    with cache.occasion("mine"):
        cache.share_occasion()
        made = cache.entry("judgements", "k", lambda folder: None)
    with cache.occasion("the first one's"):
        assert cache._place("judgements", "k") == made
