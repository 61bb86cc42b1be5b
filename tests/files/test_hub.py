"""Against a real folder in huggingface_hub's own layout, without a network."""

from pathlib import Path

import pytest

from policypatch.errors import PolicyPatchError
from policypatch.files import cache
from policypatch.files.sources import fetch, fetch_all, identity

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for repo in ("models--org--name", "datasets--org--name"):
        root = tmp_path / "hub" / repo
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(COMMIT)
        for name in ("config.json", "data/a.jsonl", "data/b.jsonl", "data/more/c.jsonl"):
            path = root / "snapshots" / COMMIT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    return tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT


def test_files_of_a_repository(snapshot: Path) -> None:
    assert fetch({"hub": "org/name"}) == snapshot
    assert fetch({"hub": "org/name", "file": "config.json"}) == snapshot / "config.json"
    found = fetch_all({"hub": "org/name", "revision": COMMIT, "file": "data/*.jsonl"})
    assert found == [snapshot / "data" / "a.jsonl", snapshot / "data" / "b.jsonl"]
    data = fetch({"hub": "org/name", "type": "dataset", "file": "data/a.jsonl"})
    assert "datasets--org--name" in data.parts


def test_a_branch_is_identified_by_its_commit(snapshot: Path) -> None:
    for source in ({"hub": "org/name"}, {"hub": "org/name", "file": "data/a.jsonl"}):
        assert identity(source)["revision"] == COMMIT
        assert cache.content_key(source=identity(source))


def test_a_commit_is_its_own_identity(snapshot: Path) -> None:
    source = {"hub": "org/elsewhere", "revision": "f" * 40}  # never fetched
    assert identity(source)["revision"] == "f" * 40


@pytest.mark.parametrize("file", ["pytorch_model.bin", "*.pt", "x/model.ckpt"])
def test_a_pickle_of_a_model_is_refused(snapshot: Path, file: str) -> None:
    with pytest.raises(PolicyPatchError, match=r"model\.source: .* may be a pickle"):
        fetch({"hub": "org/name", "file": file}, "model.source")


def test_pickles_are_never_asked_for(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetch({"hub": "org/name"})
    assert {"*.bin", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5"} <= set(asked["ignore_patterns"])


@pytest.mark.parametrize(
    "source",
    [{"hub": "org/other"}, {"hub": "org/name", "file": "absent.json"}, {"hub": "org/name", "revision": "v9"}],
)
def test_what_is_not_here_needs_a_network(snapshot: Path, source: dict[str, str]) -> None:
    with pytest.raises(PolicyPatchError, match=r"model\.source: cannot fetch .*network.*path"):
        fetch(source, "model.source")


def test_a_pattern_that_matches_nothing(snapshot: Path) -> None:
    with pytest.raises(PolicyPatchError, match=r"m: .*\*\.csv"):
        fetch({"hub": "org/name", "file": "*.csv"}, "m")
