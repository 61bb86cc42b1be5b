"""Against a real folder in huggingface_hub's own layout, without a network."""

import http.server
import os
import re
import socket
import subprocess
import sys
import threading
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


class Hub(http.server.BaseHTTPRequestHandler):
    """Has one file of one repository; sends half of it and is gone while `breaks`."""

    breaks = True
    content = bytes(range(256)) * 1000

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("ETag", '"1234"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()

    def do_GET(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.send_header("ETag", '"1234"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not self.breaks:
            self.wfile.write(self.content[start:])
            return
        self.wfile.write(self.content[: len(self.content) // 2][start:])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_network_that_goes_in_the_middle_of_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come stays, and no half of it is taken for the file."""
    program = (
        "import logging, sys, policypatch.files.sources as s, policypatch.progress as p\n"
        "logging.basicConfig(level=logging.INFO); p.LINE_EVERY_S = 0\n"
        "try: print(s.fetch({'hub': 'org/name', 'file': 'model.safetensors'}, 'model.source'))\n"
        "except s.PolicyPatchError as error: sys.exit(f'error: {error}')"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        environment = os.environ | place | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

        def fetched() -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", program]
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

        broken = fetched()
        assert broken.returncode == 1
        last = broken.stderr.strip().splitlines()[-1]
        assert last.startswith("error: model.source: cannot fetch 'model.safetensors' of org/name at main: ")
        assert not list((tmp_path / "hub").rglob("snapshots/*/model.safetensors"))
        monkeypatch.setattr(Hub, "breaks", False)
        whole = fetched()
        server.shutdown()
    assert whole.returncode == 0, whole.stderr
    assert Path(whole.stdout.strip()).read_bytes() == Hub.content
    assert re.search(
        r"downloading org/name: [\d.]+ kB of 256\.0 kB, about 0 s left", whole.stderr
    )  # no terminal: lines
