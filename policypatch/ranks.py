"""The processes of one run, its ranks: all do the same things in the same order, and share out what goes row by row.

A run of one process is its own first rank. Of several, each has a copy of everything and the first alone writes. What
one of them cannot do ends the run on all of them, with the same sentence: a rank that waits for one that is gone would
wait for ever.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from policypatch.errors import PolicyPatchError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # of a rank that waits for another: the first may make something for hours


@dataclass(frozen=True)
class _Place:
    """Which of how many ranks this process is."""

    rank: int = 0
    size: int = 1
    on_machine: int = 0  # its number among those of its machine


_place = _Place()
_group: Any = None  # torch's process group that the ranks tell each other things in, also while one is `alone`
_meanwhile: Callable[[], None] | None = None


def rank() -> int:
    """This process's number, from 0."""
    return _place.rank


def size() -> int:
    """How many there are."""
    return _place.size


def on_machine() -> int:
    """This process's number among those of its machine, from 0."""
    return _place.on_machine


def meanwhile(do: Callable[[], None] | None) -> None:
    """What a rank does before it waits for the others, whatever it is that it waits for; it returns once all wait."""
    global _meanwhile
    _meanwhile = do


def any_of(mine: bool) -> bool:
    """Whether it is so on any of the ranks. Quick: a number, where `gather` tells things."""
    import torch
    from torch import distributed

    told = torch.tensor([int(mine)])
    distributed.all_reduce(told, distributed.ReduceOp.MAX, group=_group)
    return bool(told)


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return _place.rank == 0


def environment() -> ClusterEnvironment | None:
    """What has started this process as one of several (torchrun, srun), None where nothing has."""
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if _by_srun() else None


def one_of_several() -> bool:
    """Whether this process is one of several that something else has started; known before torch is there."""
    return _by_srun() or ("TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1)


def _by_srun() -> bool:
    # Lightning's `detect` would warn of every machine that has srun; a job of one task is one process. A batch script
    # has a rank and a number of tasks as well, but is none of them: they are there once srun has begun a step.
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and {"SLURM_PROCID", "SLURM_STEP_ID"} <= set(os.environ)


def join(found: ClusterEnvironment | None, on_gpu: bool) -> None:
    """Become one of the ranks that `found` has started; nothing where it has started one, or was joined before.

    Afterwards "cuda" is the rank's own GPU.
    """
    import torch
    from torch import distributed

    global _place, _group
    if found is None or found.world_size() == 1 or size() > 1:
        return
    number, count = found.global_rank(), found.world_size()
    if on_gpu:
        torch.cuda.set_device(found.local_rank())
    address = f"tcp://{found.main_address}:{found.main_port}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        address = "env://"  # the agent that started the ranks has the store, and with it the port
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, address, world_size=count, rank=number, timeout=PATIENCE)
    _group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    _place = _Place(number, count, found.local_rank())
    if number:
        _speak_as(number)


def leave() -> None:
    """Be a process by itself again."""
    from torch import distributed

    global _place, _group
    if size() > 1:
        meanwhile(None)
        _place, _group = _Place(), None
        distributed.destroy_process_group()


def _speak_as(number: int) -> None:
    """What all ranks do is told by the first; the others say what goes wrong, and who they are."""
    logging.getLogger().setLevel(logging.WARNING)

    def named(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = logging.LogRecord(*args, **kwargs)
        record.msg = f"rank {number}: {record.msg}"
        return record

    logging.setLogRecordFactory(named)


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this rank is a process by itself: it writes, and waits for nobody."""
    global _place
    before, _place = _place, _Place()
    try:
        yield
    finally:
        _place = before


def gather(thing: T) -> list[T]:
    """What every rank gives, in their order, on all of them."""
    if size() == 1:
        return [thing]
    from torch import distributed

    if _meanwhile is not None:
        _meanwhile()
    found: list[Any] = [None] * size()
    distributed.all_gather_object(found, thing, group=_group)
    return found


def agree(do: Callable[[], T]) -> list[T]:
    """Have every rank do something; what each came to, on all of them.

    Raises:
        Exception: on a rank that failed, what it raised; on every other one the first's, as a PolicyPatchError.
    """
    if size() == 1:
        return [do()]
    came_to, failure = None, None
    try:
        came_to = do()
    except Exception as error:
        failure = error
    told = gather((came_to, None if failure is None else _said(failure)))
    if failure is not None:
        raise failure
    if faults := [fault for _, fault in told if fault is not None]:
        raise faults[0]
    return [result for result, _ in told]  # type: ignore[misc]


def _said(error: Exception) -> PolicyPatchError:
    if isinstance(error, PolicyPatchError):
        return error
    return PolicyPatchError(f"rank {rank()} on {socket.gethostname()}: {type(error).__name__}: {error}")


def once(do: Callable[[], T]) -> T:
    """What the first rank came to, by itself, on all of them; the others wait. Raises as `agree` does."""
    if size() == 1:
        return do()

    def by_itself() -> T:
        with alone():
            return do()

    return agree(by_itself if first() else lambda: None)[0]  # type: ignore[return-value]


def share(rows: int) -> range:
    """Which of so many rows are this rank's: consecutive ones, as many as any other's, or one more."""
    return range(rows * rank() // size(), rows * (rank() + 1) // size())


def parts(rows: int, make: Callable[[range], T]) -> list[T]:
    """What `make` gives for so many rows, of which each rank makes its share: the parts in the rows' order, on all.

    Args:
        rows: how many.
        make: is called with the row numbers of a share; on a rank that has none only where there are no rows at all.
    """

    def ours() -> T | None:
        numbers = share(rows)
        if rows and not numbers:
            return None
        return make(numbers)

    return [part for part in agree(ours) if part is not None]


def in_turn(make: Callable[[], T]) -> T:
    """What `make` gives, on one rank of each machine after another, whose memory holds one whole model at a time.

    Raises as `agree` does.
    """
    made: list[T] = []

    def ours() -> None:
        made.append(make())

    for turn in range(1 + max(gather(on_machine()))):
        agree(ours if turn == on_machine() else lambda: None)
    return made[0]
