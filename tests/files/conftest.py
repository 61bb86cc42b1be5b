"""A cache of its own for every test, and wheels that pip finds in a folder instead of an index."""

import base64
import hashlib
import zipfile
from collections.abc import Callable, Iterator
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
