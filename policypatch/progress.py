"""How far a run is: a bar with the time left on a terminal, plain lines elsewhere; and what each part took."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from policypatch import ranks

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0


def terminal() -> Console | None:
    """Where bars are drawn; None where lines are written: into a file or a pipe, and in a job of SLURM."""
    console = Console(stderr=True)
    return console if console.is_terminal and "SLURM_JOB_ID" not in os.environ else None


class ByteLines:
    """A line now and then of how far a download is.

    Args:
        what: is downloaded.
        begun: bytes that were there before, as of a download that goes on.
    """

    def __init__(self, what: str, begun: float = 0) -> None:
        self.what, self.begun = what, begun
        self.started = self.said = time.monotonic()

    def update(self, done: float, total: float | None) -> None:
        """So many bytes are there, of so many if that is known."""
        now = time.monotonic()
        if total is None or done <= self.begun or now - self.said < LINE_EVERY_S:
            return
        left = (now - self.started) / (done - self.begun) * (total - done)
        sizes = decimal(int(done)), decimal(int(total))
        log.info("downloading %s: %s of %s, about %.0f s left", self.what, *sizes, left)
        self.said = now


@contextmanager
def track(what: str, total: int, begun: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how far `what` is; yields a function that is told how many more are done.

    Args:
        what: in a word or two.
        total: how many there are to do.
        begun: how many of them were done before.
    """
    if not ranks.first():  # its share is as large as that of any other, whose progress the first one shows
        yield lambda n: None
        return
    if console := terminal():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(what, total=total, completed=begun)
            yield lambda n: progress.advance(task, n)
        return
    started = said = time.monotonic()
    done = begun

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        now = time.monotonic()
        if now - said >= LINE_EVERY_S or done >= total:
            left = (now - started) / (done - begun) * (total - done)
            log.info("%s: %d of %d, about %.0f s left", what, done, total, left)
            said = now

    yield advance


class Clock:
    """Seconds of each part of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a part and say that it started."""
        log.info("%s ...", part)
        start = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - start, 2)
