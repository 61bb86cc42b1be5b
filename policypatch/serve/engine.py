"""Answering many requests at once, each behind a stack of its own: continuous batching over the slots.

One thread reads and writes the model. Each round it lets waiting requests into free slots (a forward each), then takes
one step for all that are in a slot. A request leaves as soon as it has ended, and another takes its place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from policypatch.errors import PolicyPatchError
from policypatch.model.base import Base
from policypatch.model.decode import row_key
from policypatch.model.parts import same_positions, sliding_window
from policypatch.model.sampling import Sampling, next_tokens, uniforms
from policypatch.serve.roots import Roots
from policypatch.serve.slots import Slots
from policypatch.serve.text import Writer

log = logging.getLogger(__name__)
KEPT = 2  # times the context: positions whose keys and values are kept for requests to come
AT_ONCE = 512  # tokens of prompts that are read in a round, by which the others' next token is late


class BusyError(PolicyPatchError):
    """The queue is full, or the engine is stopping."""


@dataclass
class Job:
    """A request.

    Attributes:
        prompt: token ids, one at least.
        stack: names of patches in the order in which they stand.
        sampling: how to draw; `max_new_tokens` is the most that is written.
        seed: fixes the draws, with the prompt's tokens.
        stop: texts that end the answer and are no part of it.
        tell: called from the engine's thread with each piece of text and, at the end, why it ended: `stop`, `length`,
            `cancelled`, or `error`.
        cancelled: set by whoever no longer wants the answer.
    """

    prompt: Sequence[int]
    stack: tuple[str, ...]
    sampling: Sampling
    seed: int
    stop: Sequence[str] = ()
    tell: Callable[[str, str | None], None] = lambda text, why: None
    cancelled: bool = False
    written: list[int] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    first: float | None = None


@dataclass
class _Running:
    job: Job
    writer: Writer
    draws: Tensor  # (steps, DRAWS + 1)


class Engine:
    """A base, its patches, and the requests that they answer.

    Args:
        base: loaded.
        patches: vectors (L, D) by name.
        rows: requests answered at once.
        context: positions a request may take, stack and answer included; None is all that the base has.
        waiting: requests that may wait for a slot.
    """

    def __init__(
        self,
        base: Base,
        patches: Mapping[str, Tensor],
        rows: int = 16,
        context: int | None = None,
        waiting: int = 64,
    ):
        known = (base.context, sliding_window(base.model), same_positions(base.model), context)
        limits = [limit for limit in known if limit is not None]
        self.base, self.patches, self.context, self.waiting = base, dict(patches), min(limits, default=4096), waiting
        self.slots = Slots(base.model, rows, self.context)
        self.queue: deque[Job] = deque()
        self.running: list[_Running] = []
        self.roots = Roots(base, self.patches, KEPT * self.context)
        self._wake = threading.Condition()
        self.stopping = False  # no more requests are taken
        self._abandoned = False
        self._failed = False  # nothing is answered any more
        self._thread: threading.Thread | None = None

    def check(self, prompt: Sequence[int], stack: Sequence[str], most: int | None) -> int:
        """How many tokens an answer may have.

        Args:
            prompt: token ids.
            stack: names of patches.
            most: what the request asks for; None is whatever fits.

        Raises:
            PolicyPatchError: an empty prompt, or one that leaves no room for what is asked for.
        """
        if not prompt:
            raise PolicyPatchError("the prompt has no tokens: give it text")
        vectors = sum(len(self.patches[name]) for name in stack)
        room = self.context - vectors - len(prompt)
        if room < (1 if most is None else most):
            asked = "" if most is None else f" and {most} new ones"
            raise PolicyPatchError(
                f"{len(prompt)} tokens{asked} behind {vectors} vectors do not fit a context of {self.context}: "
                "shorten the prompt or lower max_tokens"
            )
        return room if most is None else most

    def submit(self, job: Job) -> None:
        """Have a request answered.

        Raises:
            BusyError: as many wait as may, or the engine is stopping.
        """
        with self._wake:
            if self.stopping or not self.alive:
                raise BusyError("the server is stopping" if self.stopping else "the server has failed: restart it")
            for gone in [waiting for waiting in self.queue if waiting.cancelled]:
                self.queue.remove(gone)
                self._tell(gone, "", "cancelled")
            if len(self.queue) >= self.waiting:
                raise BusyError(f"{len(self.queue)} requests are waiting: try again in a moment")
            self.queue.append(job)
            self._wake.notify()

    @property
    def full(self) -> bool:
        """Whether as many wait as may."""
        return sum(not job.cancelled for job in list(self.queue)) >= self.waiting

    @property
    def alive(self) -> bool:
        """Whether requests are answered, or will be once it is started."""
        return not self._failed and (self._thread is None or self._thread.is_alive())

    def start(self) -> None:
        """Answer requests in a thread, until `stop`."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def stop(self, patience: float = 10.0) -> None:
        """Take no more requests; end when those that are there are answered, or after `patience` seconds."""
        with self._wake:
            self.stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(patience)
            self._abandoned = True  # the thread sees to the rest, which is its own
            self._thread.join(patience)

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self.queue or self.running or self.stopping):
                    self._wake.wait()
                if self.stopping and not (self.queue or self.running):
                    return
            try:
                self.round()
            except Exception:  # whatever it was, its requests are told and the others go on
                log.exception("a round failed; %d requests end", len(self.running))
                try:
                    while self.running:
                        self._end(len(self.running) - 1, "error")
                except Exception:  # a device that failed fails in clearing up as well: nobody is to wait for it
                    log.exception("nor could their slots be given back: the server answers no more")
                    with self._wake:  # whoever comes from now on is refused: the thread still lives, and tells no more
                        self._failed = True
                        left = [*(row.job for row in self.running), *self.queue]
                        self.queue.clear()
                    for job in left:
                        self._tell(job, "", "error")
                    return

    def round(self) -> None:
        """Let requests in, and write one token for each that is there."""
        read = 0  # tokens of prompts: those who are being answered wait for these
        while self.queue and len(self.running) < self.slots.rows and (read < AT_ONCE or not self.running):
            with self._wake:
                job = self.queue.popleft()
            if job.cancelled or self._abandoned:
                self._tell(job, "", "cancelled")
                continue
            read += len(job.prompt)
            self._enter(job)
        for slot in reversed(range(len(self.running))):
            if self.running[slot].job.cancelled or self._abandoned:
                self._end(slot, "cancelled")
        if self.running:
            self._written(range(len(self.running)), self.slots.step([row.job.written[-1] for row in self.running]))

    def _enter(self, job: Job) -> None:
        """Read a request's prompt and write its first token; what fails, fails alone."""
        entered = len(self.running)
        try:
            steps = job.sampling.max_new_tokens if job.sampling.temperature else 0
            draws = uniforms(job.seed, [row_key(job.prompt, 0)], steps)[0]
            running = _Running(job, Writer(self.base, job.prompt, job.stop), draws)
            root, read = self.roots.of(job.stack, job.prompt)
            logits = self.slots.enter(root, job.prompt[read:])
            self.running.append(running)
            job.first = time.monotonic()
            self._written([entered], logits[None])
        except Exception:  # whoever asked is told, and the log says why; the others go on
            log.exception("a request could not be read")
            if len(self.running) > entered:
                self._end(entered, "error")
            else:
                self._tell(job, "", "error")

    def _written(self, slots: Sequence[int], logits: Tensor) -> None:
        """Draw the next token of these slots from logits (n, V); end those that have ended."""
        ended = []
        for slot, token in zip(slots, self._drawn(slots, logits), strict=True):
            running = self.running[slot]
            job = running.job
            if token in self.base.eos:
                ended.append((slot, "stop"))
                continue
            job.written.append(token)
            text = running.writer.add(token)
            if running.writer.stopped:
                self._tell(job, text)
                ended.append((slot, "stop"))
            elif len(job.written) == job.sampling.max_new_tokens:
                self._tell(job, text)
                ended.append((slot, "length"))
            elif text:
                self._tell(job, text)
        for slot, why in reversed(ended):
            self._end(slot, why)

    def _drawn(self, slots: Sequence[int], logits: Tensor) -> list[int]:
        """One token for each, those that are drawn alike together."""
        alike: dict[tuple[float, float], list[int]] = {}
        for i, slot in enumerate(slots):
            sampling = self.running[slot].job.sampling
            alike.setdefault((sampling.temperature, sampling.top_p), []).append(i)
        tokens = [0] * len(slots)
        for members in alike.values():
            rows = [self.running[slots[i]] for i in members]
            sampling = rows[0].job.sampling
            draws = [row.draws[len(row.job.written)] for row in rows] if sampling.temperature else []
            drawn = next_tokens(logits[members], sampling, torch.stack(draws).to(logits.device) if draws else logits)
            for i, token in zip(members, drawn.tolist(), strict=True):
                tokens[i] = token
        return tokens

    def _end(self, slot: int, why: str) -> None:
        running = self.running[slot]
        self.slots.leave(slot)
        last = self.running.pop()
        if last is not running:
            self.running[slot] = last
        text = "" if why in ("cancelled", "error") else running.writer.rest()
        if running.writer.stopped:
            why = "stop"
        self._tell(running.job, text, why)

    def _tell(self, job: Job, text: str, why: str | None = None) -> None:
        """Whoever asked may be gone in any way; that ends nothing here."""
        try:
            job.tell(text, why)
        except Exception:  # a closed event loop, mostly: the server is going down, or the client's connection went
            log.exception("an answer could not be handed over")
            job.cancelled = True
