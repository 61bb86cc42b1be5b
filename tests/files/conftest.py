"""A cache of its own for every test, and wheels that pip finds in a folder instead of an index."""

import base64
import hashlib
import http.server
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from policypatch.files import cache

MakeWheel = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "cache"
    monkeypatch.setenv("POLICYPATCH_CACHE", str(root))
    cache.reset_counters()
    yield root
    cache.reset_counters()


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeWheel:
    """make_wheel({member: bytes}, version=...) -> (spec, sha256) of a wheel that real pip can download."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))

    def make(members: dict[str | zipfile.ZipInfo, bytes], version: str = "1.0") -> tuple[str, str]:
        info = f"toydata-{version}.dist-info"
        files: dict[str | zipfile.ZipInfo, bytes] = dict(members)
        files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: toydata\nVersion: {version}\n".encode()
        files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        record = ""
        path = links / f"toydata-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as file:
            for member, content in files.items():
                file.writestr(member, content)
                name = member if isinstance(member, str) else member.filename
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                record += f"{name},sha256={digest},{len(content)}\n"
            file.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
        return f"toydata=={version}", hashlib.sha256(path.read_bytes()).hexdigest()

    return make


@pytest.fixture
def serve_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[int]]:
    """with serve_wheel(send) as size: an index of the wheel that was made, sent by `send(handler, content)`."""

    @contextmanager
    def serve(send: Callable[[http.server.BaseHTTPRequestHandler, bytes], None]) -> Iterator[int]:
        (path,) = (tmp_path / "links").glob("*.whl")
        content = path.read_bytes()

        class Index(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wheel = self.path.endswith(".whl")
                page = f"<a href='/{path.name}'>{path.name}</a>".encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/zip" if wheel else "text/html")
                self.send_header("Content-Length", str(len(content) if wheel else len(page)))
                self.end_headers()
                if wheel:
                    send(self, content)
                else:
                    self.wfile.write(page)

            def log_message(self, *arguments: object) -> None:
                pass

        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_NO_INDEX", "0")
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
            try:
                yield len(content)
            finally:
                server.shutdown()

    return serve
