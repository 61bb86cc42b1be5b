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
from transformers import DynamicCache, PreTrainedModel

from policypatch.errors import PolicyPatchError
from policypatch.model.backbone import sliding_window
from policypatch.model.base import Base
from policypatch.model.decode import row_key
from policypatch.model.sampling import Sampling, next_tokens, uniforms
from policypatch.model.tree import common_prefix
from policypatch.serve.slots import Slots, prefix_cache
from policypatch.serve.text import Writer

log = logging.getLogger(__name__)
KEPT = 2  # times the context: positions whose keys and values are kept for requests to come
WORTH = 8  # tokens that prompts must share beyond what is known before that is computed apart
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
        known = (base.context, sliding_window(base.model), _one_rope(base.model), context)
        limits = [limit for limit in known if limit is not None]
        self.base, self.patches, self.context, self.waiting = base, dict(patches), min(limits, default=4096), waiting
        self.slots = Slots(base.model, rows, self.context)
        self.queue: deque[Job] = deque()
        self.running: list[_Running] = []
        self._roots: dict[tuple[tuple[str, ...], tuple[int, ...]], DynamicCache] = {}
        self._last: dict[tuple[str, ...], Sequence[int]] = {}
        self._wake = threading.Condition()
        self._stopping = self._abandoned = False
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
            if self._stopping or not self.alive:
                raise BusyError("the server is stopping" if self._stopping else "the server has failed: restart it")
            for gone in [waiting for waiting in self.queue if waiting.cancelled]:
                self.queue.remove(gone)
                self._tell(gone, "", "cancelled")
            if len(self.queue) >= self.waiting:
                raise BusyError(f"{len(self.queue)} requests are waiting: try again in a moment")
            self.queue.append(job)
            self._wake.notify()

    @property
    def stopping(self) -> bool:
        """Whether no more requests are taken."""
        return self._stopping

    @property
    def full(self) -> bool:
        """Whether as many wait as may."""
        return sum(not job.cancelled for job in list(self.queue)) >= self.waiting

    @property
    def alive(self) -> bool:
        """Whether requests are answered, or will be once it is started."""
        return self._thread is None or self._thread.is_alive()

    def start(self) -> None:
        """Answer requests in a thread, until `stop`."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def stop(self, patience: float = 10.0) -> None:
        """Take no more requests; end when those that are there are answered, or after `patience` seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(patience)
            self._abandoned = True  # the thread sees to the rest, which is its own
            self._thread.join(patience)

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self.queue or self.running or self._stopping):
                    self._wake.wait()
                if self._stopping and not (self.queue or self.running):
                    return
            try:
                self.round()
            except Exception:  # whatever it was, its requests are told and the others go on
                log.exception("a round failed; %d requests end", len(self.running))
                while self.running:
                    self._end(len(self.running) - 1, "error")

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
            root, read = self._root(job)
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

    def _root(self, job: Job) -> tuple[DynamicCache | None, int]:
        """Keys and values of the stack and of the longest known beginning of the prompt, and tokens of that beginning.

        What a stack's last two prompts began with (a chat's system message) is taken for what the next ones begin with.
        Roots are computed when they are first asked for; those asked for long ago are dropped.
        """
        prompt, last = job.prompt, self._last.get(job.stack, ())
        self._last[job.stack] = prompt
        common = min(common_prefix([prompt, last]), len(prompt) - 1)
        known = [key for key in self._roots if key[0] == job.stack and tuple(prompt[: len(key[1])]) == key[1]]
        best = max(known, key=lambda key: len(key[1]), default=(job.stack, ()))
        best = (job.stack, best[1] if len(best[1]) < len(prompt) else ())
        if common >= len(best[1]) + WORTH:
            best = (job.stack, tuple(prompt[:common]))
        if best == ((), ()):
            return None, 0
        root = self._roots.pop(best, None)
        if root is None:
            model = self.base.model
            parts = [self.patches[name].to(model.device, model.dtype) for name in job.stack]
            parts.append(model.get_input_embeddings()(torch.tensor(best[1], dtype=torch.long, device=model.device)))
            root = prefix_cache(model, torch.cat(parts))
        self._roots[best] = root
        while len(self._roots) > 1 and sum(map(_length, self._roots.values())) > KEPT * self.context:
            del self._roots[next(iter(self._roots))]
        return root, len(best[1])

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


def _length(prefix: DynamicCache) -> int:
    return int(prefix.get_seq_length())


def _one_rope(model: PreTrainedModel) -> int | None:
    """How far positions go before a model's rotary frequencies depend on the longest row of a batch; None: never.

    Beyond, a request's answer would depend on who else is there.
    """
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "dynamic"):
        return None
    own = getattr(model.config, "original_max_position_embeddings", None)
    return rope.get("original_max_position_embeddings") or own or model.config.max_position_embeddings
