"""What an arm costs when it answers: the time to its first token and for each further one, relative to the base.

The machine's speed drifts and other work disturbs it, so base and arm are timed in turn within one process, and what
counts is the ratio of each pair of neighbours. Which of the two comes first changes from pair to pair, and before each
stands a short answer of its own, to one prompt, that is not timed: who comes after another's weights begins cold.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from policypatch.model.arm import Arm
from policypatch.model.base import Base
from policypatch.model.decode import sample
from policypatch.model.sampling import Sampling

NEW_TOKENS = 17  # the time for each is a mean over all but the first
WARMING = 2  # tokens of an answer that is not timed
TIMING = 5
"""Number of the way of timing: counted up when a change here or in `sample` would give other ratios."""


@dataclass(frozen=True)
class Load:
    """A batch that an arm answers: `batch` prompts of `prompt` tokens each."""

    prompt: int
    batch: int


def ratios(base: Base, arm: Arm, load: Load, repeats: int, merged: bool = False) -> np.ndarray:
    """Time of the arm / time of the base, to the first token and for each further one: (repeats, 2).

    1.02 is 2 % slower. Nothing is reused from one answer to the next: the time to the first token holds the patch or
    the safety prompt, too.

    Args:
        base: the base.
        arm: vectors, a safety prompt or adapters on it.
        load: what is answered.
        repeats: pairs that are timed, after one that is not.
        merged: adapters are added to the weights before, as one does who serves nothing else.
    """
    prompts = _prompts(base, load)
    before = base.encode(arm.guidance.system or arm.guidance.before or "")
    guided = [[*before, *prompt] for prompt in prompts]

    def of_arm() -> np.ndarray:
        with _adapted(arm, merged):
            return _seconds(base, guided, arm)

    def of_base() -> np.ndarray:
        with nullcontext() if arm.lora is None else arm.lora.lora.taken_out():
            return _seconds(base, prompts, Arm("base"))

    rows = []
    for turn in range(repeats + 1):
        seconds = {ask: ask() for ask in (of_arm, of_base)[:: 1 if turn % 2 else -1]}
        rows.append(seconds[of_arm] / seconds[of_base])
    return np.array(rows[1:])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without collections of garbage, each of which may take as long as a token or, on a GPU, a training step."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _adapted(arm: Arm, merged: bool) -> Iterator[None]:
    """The arm's adapters at work, if it has any, in the base's precision as one would serve them."""
    with ExitStack() as stack:
        if arm.lora is not None:
            stack.enter_context(arm.lora.applied())
            stack.enter_context(arm.lora.lora.cast())
            if merged:
                stack.enter_context(arm.lora.lora.merged())
                stack.enter_context(arm.lora.lora.taken_out())
        yield


def _prompts(base: Base, load: Load) -> list[list[int]]:
    generator = torch.Generator().manual_seed(load.prompt)
    known = min(len(base.tokenizer), base.embedding.shape[0])  # some tokenizers know tokens that have no embedding
    return torch.randint(0, known, (load.batch, load.prompt), generator=generator).tolist()


def _seconds(base: Base, prompts: Sequence[Sequence[int]], arm: Arm) -> np.ndarray:
    """To the first token, and for each of those after it: (2,)."""

    def answered(asked: Sequence[Sequence[int]], tokens: int) -> list[float]:
        ticks: list[float] = []
        tick = _clock(base, ticks.append)
        tick()
        greedy = Sampling(temperature=0.0, max_new_tokens=tokens)
        sample(base.model, asked, arm.vectors, 1, greedy, max_rows=len(asked), tick=tick)
        return ticks

    answered(prompts[:1], WARMING)
    with undisturbed():
        ticks = answered(prompts, NEW_TOKENS)
    return np.array([ticks[1] - ticks[0], (ticks[-1] - ticks[1]) / (len(ticks) - 2)])


def _clock(base: Base, write: Callable[[float], None]) -> Callable[[], None]:
    """Writes the time down when everything before it has really been computed."""

    def tick() -> None:
        if base.model.device.type == "cuda":
            torch.cuda.synchronize(base.model.device)
        write(time.perf_counter())

    return tick
