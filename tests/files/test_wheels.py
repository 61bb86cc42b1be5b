import hashlib
import http.server
import logging
import os
import re
import socket
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from policypatch.errors import PolicyPatchError
from policypatch.files import cache, wheels
from policypatch.files.sources import fetch, fetch_all, identity

MEMBERS = {
    "toydata/__init__.py": b"raise SystemExit('a data source is never imported')",
    "toydata/data/a.txt": b"A",
    "toydata/data/b.txt": b"B",
    "toydata/data/about.json": b"{}",  # the cache's own file has this name too
    "toydata/data/deep/c.txt": b"C",
}


def test_files_of_a_wheel(make_wheel, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec, sha256 = make_wheel(MEMBERS)
    source = {"wheel": spec, "sha256": sha256.upper()}
    with caplog.at_level(logging.INFO):
        one = fetch({**source, "file": "toydata/data/a.txt"}, "risk.source")
        several = fetch_all({**source, "file": "toydata/data/*.txt"}, "risk.source")
        deep = fetch_all({**source, "file": "toydata/**/*.txt"}, "risk.source")
        about = fetch({**source, "file": "toydata/data/about.json"})
    assert one.read_bytes() == b"A"
    assert [path.name for path in several] == ["a.txt", "b.txt"]
    assert [path.name for path in deep] == ["a.txt", "b.txt", "c.txt"]
    assert about.read_bytes() == b"{}"
    # Four sources of one wheel: downloaded once, and nothing but the members asked for is unpacked.
    assert cache.counters()["wheels"] == {"hits": 3, "misses": 1}
    said = [record.message for record in caplog.records if record.name == wheels.__name__]
    assert said[0] == "downloading toydata==1.0 with pip"
    assert said[1].startswith("downloaded toydata-1.0-py3-none-any.whl")
    assert len(said) == 2
    assert not list(own_cache.rglob("__init__.py"))
    assert not list(own_cache.rglob("scratch"))


def test_a_second_run_needs_no_pip(make_wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, sha256 = make_wheel(MEMBERS)
    source = {"wheel": spec, "sha256": sha256, "file": "toydata/data/*.txt"}
    first = fetch_all(source)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert fetch_all(source) == first
    assert identity(source) == source


def test_another_digest_is_refused_and_not_kept(make_wheel, own_cache: Path) -> None:
    spec, sha256 = make_wheel(MEMBERS)
    wrong = "0" * 64
    with pytest.raises(PolicyPatchError) as error:
        fetch({"wheel": spec, "sha256": wrong, "file": "toydata/data/a.txt"}, "risk.source")
    assert str(error.value).startswith("risk.source: ")
    assert sha256 in str(error.value)
    assert wrong in str(error.value)
    assert not [p for p in own_cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_a_damaged_download_is_fetched_again(make_wheel, serve_wheel, caplog: pytest.LogCaptureFixture) -> None:
    spec, sha256 = make_wheel({"toydata/a.txt": b"x" * 10_000})
    answers = iter([True, False])

    def damaged_once(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        handler.wfile.write(content.replace(b"xx", b"xy", 1) if next(answers) else content)

    with serve_wheel(damaged_once), caplog.at_level(logging.WARNING):
        assert fetch({"wheel": spec, "sha256": sha256, "file": "toydata/a.txt"}, "s").read_bytes() == b"x" * 10_000
    assert caplog.messages == ["toydata-1.0-py3-none-any.whl has not the sha256 that s says: downloading it again"]


def test_a_file_that_is_not_in_the_wheel(make_wheel) -> None:
    spec, sha256 = make_wheel(MEMBERS)
    for wanted in ("toydata/a.txt", "toydata/data/aa.txt"):
        with pytest.raises(PolicyPatchError, match=r"near matches: toydata/data/a\.txt"):
            fetch({"wheel": spec, "sha256": sha256, "file": wanted})


def test_a_version_that_does_not_exist(make_wheel) -> None:
    make_wheel(MEMBERS, version="1.0")
    make_wheel(MEMBERS, version="1.1")
    with pytest.raises(PolicyPatchError, match=r"toydata==3\.0 .* no such version .* 1\.0, 1\.1"):
        fetch({"wheel": "toydata==3.0", "sha256": "0" * 64, "file": "x"})


def test_a_package_that_pip_does_not_find(make_wheel) -> None:
    with pytest.raises(PolicyPatchError, match=r"s\.source: nosuchdata==1 .* network; or .* \{path"):
        fetch({"wheel": "nosuchdata==1", "sha256": "0" * 64, "file": "x"}, "s.source")


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(PolicyPatchError, match="pip reached no package index; it has to be fetched once"):
        fetch({"wheel": "toydata==1.0", "sha256": "0" * 64, "file": "x"})


@pytest.mark.parametrize("name", ["../escape.txt", "/tmp/escape.txt", "toydata/../../escape.txt", "a\\..\\b.txt"])
def test_a_member_that_leads_out_of_its_folder_is_refused(make_wheel, own_cache: Path, name: str) -> None:
    spec, sha256 = make_wheel({name: b"x", "toydata/good.txt": b"x"})
    pattern = "**" if not name.startswith("/") else name
    with pytest.raises(PolicyPatchError, match="leads out of its folder"):
        fetch_all({"wheel": spec, "sha256": sha256, "file": pattern})
    assert not list(own_cache.parent.rglob("escape.txt"))
    assert not Path("/tmp/escape.txt").exists()


def test_a_link_in_a_wheel_is_refused(make_wheel) -> None:
    link = zipfile.ZipInfo("toydata/link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    spec, sha256 = make_wheel({link: b"/etc/passwd"})
    with pytest.raises(PolicyPatchError, match="leads out of its folder"):
        fetch({"wheel": spec, "sha256": sha256, "file": "toydata/link.txt"})


def test_what_is_no_zip_is_refused(tmp_path: Path, own_cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "toydata-1.0-py3-none-any.whl").write_bytes(b"not a zip")

    sha256 = hashlib.sha256(b"not a zip").hexdigest()
    cache.entry("wheels", cache.content_key(wheel="toydata==1.0", sha256=sha256), build)
    with pytest.raises(PolicyPatchError, match="not a readable wheel"):
        fetch({"wheel": "toydata==1.0", "sha256": sha256, "file": "x"})


def test_a_pip_in_the_working_folder_is_not_run(make_wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, sha256 = make_wheel(MEMBERS)
    (tmp_path / "pip.py").write_text("raise SystemExit('not pip')")
    monkeypatch.chdir(tmp_path)
    assert fetch({"wheel": spec, "sha256": sha256, "file": "toydata/data/a.txt"}).read_bytes() == b"A"


def test_an_interrupted_download_stops_pip_and_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def slow(command: list[str], **options) -> subprocess.Popen[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        program = "import os, time; open(os.environ['TMPDIR'] + '/half', 'w').write('x' * 100); time.sleep(60)"
        started.append(popen([sys.executable, "-c", program], **options))
        return started[-1]

    def interrupt(growth: wheels._Growth, output: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", slow)
    monkeypatch.setattr(wheels._Growth, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch({"wheel": "toydata==1.0", "sha256": "0" * 64, "file": "x"})
    assert started[0].poll() is not None
    assert not [p for p in own_cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def half(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """The network goes in the middle of it."""
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def test_a_network_that_goes_in_the_middle_of_a_download_is_told_and_nothing_is_kept(
    make_wheel, serve_wheel, own_cache: Path
) -> None:
    spec, sha256 = make_wheel({"toydata/a.txt": os.urandom(300_000)})
    source = {"wheel": spec, "sha256": sha256, "file": "toydata/a.txt"}
    with serve_wheel(half), pytest.raises(PolicyPatchError, match=r"^s: toydata==1\.0 cannot be fetched: ") as caught:
        fetch(source, "s")
    assert "\n" not in str(caught.value) and "it has to be fetched once with a network" in str(caught.value)
    assert not [path for path in own_cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    with serve_wheel(lambda handler, content: handler.wfile.write(content)):
        assert fetch(source, "s").stat().st_size == 300_000


def slowly(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """Two thirds of it, and a second later the rest."""
    handler.wfile.write(content[: len(content) * 2 // 3])
    time.sleep(1)
    handler.wfile.write(content[len(content) * 2 // 3 :])


def test_a_terminal_sees_the_download_grow(
    make_wheel, serve_wheel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a slow index on this machine, since what pip does with its temporary files is pip's own affair."""
    spec, sha256 = make_wheel({"toydata/a.txt": b"x" * 600_000})
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("TERM", "xterm")
    seen: list[tuple[float, float | None]] = []
    update = wheels._Growth.update

    def watch(growth: wheels._Growth, output: bytes) -> None:
        update(growth, output)
        (task,) = growth.progress.tasks
        seen.append((task.completed, task.total))

    monkeypatch.setattr(wheels._Growth, "update", watch)
    with serve_wheel(slowly) as size:
        fetch({"wheel": spec, "sha256": sha256, "file": "toydata/a.txt"})
    shown = capsys.readouterr()
    assert "downloading toydata==1.0 with pip" in shown.err
    assert shown.out == ""
    assert any(0 < done < total == pytest.approx(size, abs=1000) for done, total in seen if total)
    assert "kB" in shown.err


def test_a_log_says_how_long_a_download_will_take(make_wheel, serve_wheel, monkeypatch, caplog) -> None:
    spec, sha256 = make_wheel({"toydata/a.txt": b"x" * 600_000})
    monkeypatch.setattr("policypatch.progress.LINE_EVERY_S", 0.3)
    with serve_wheel(slowly), caplog.at_level(logging.INFO):
        fetch({"wheel": spec, "sha256": sha256, "file": "toydata/a.txt"})
    line = re.compile(r"downloading toydata==1\.0: \d+\.\d kB of 600\.0 kB, about \d s left")
    assert any(line.fullmatch(message) for message in caplog.messages)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("Downloading a-1-py3-none-any.whl (93.9 MB)", 93_900_000),
        ("Downloading a-1-py3-none-any.whl (12 kB)", 12_000),
        ("Downloading https://host/a.whl (714 bytes)", 714),
        (
            "  Downloading a-1-py3-none-any.whl.metadata (1.5 kB)\nDownloading a-1-py3-none-any.whl (1.2 GB)",
            1_200_000_000,
        ),
        ("Looking in indexes: https://host", None),
    ],
)
def test_what_pip_says_of_the_size(line: str, size: int | None) -> None:
    assert wheels._announced(line.encode()) == size
