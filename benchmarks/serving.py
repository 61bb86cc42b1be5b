"""The server under many clients at once: is every reply the one that its request gets alone, and does memory stay flat?

    python -m benchmarks.serving PATCH [PATCH] [--clients 32] [--seconds 60]

About three minutes. Starts `policypatch serve` for the default base in float32 and asks each request (model x kind x
prompt) alone first: whole chats, streamed chats, and texts that are continued by sampling with a seed. Then the server
is warmed up: every prompt comes twice in a row, and for every stack all rows read at once what takes more positions
than any request to come. Then each client asks one request after the other, by the official `openai` client, as fast as
it is answered, while the server's memory is read once a second. The same follows for a third of the time on a server
where `--waiting 4` makes it answer 429. Writes benchmarks/results/serving.json; exits with 1 where a reply was wrong,
another request's, or an error other than 429, where memory grew, where 429 was not seen when it should be, or a server
did not end in peace.
"""

from __future__ import annotations

import argparse
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.about import about
from benchmarks.clients import Crowd, Request, asked, at_once, client_of
from policypatch.files.atomic import write_json
from policypatch.patch.artifact import load

ROOT = Path(__file__).parent
PROMPTS = (
    "Name three fruits.",
    "Who wrote the first dictionary of English?",
    "My neighbour is loud. What can I do?",
    "Write a short note that thanks a colleague.",
    "What is the capital of France?",
    "Explain to a child why the sky is blue.",
    "Give me a recipe for pancakes.",
    "How do I tie a bow tie?",
)
KINDS = ("chat", "stream", "text")
LENGTHS = (8, 16, 32, 96)  # tokens of an answer, at most
ROWS, WAITING = 16, 64  # the command's own defaults
FEW = 4  # waiting, where 429 is to be seen: with the rows fewer than there are clients
# The warm-up's prompt has 128 tokens at least: with its answer more than any request has (40) with its own (96).
LONG, LONG_ANSWER = " ".join(PROMPTS * 2), 12
# MB a minute that memory may grow by. What an answer leaves behind is kilobytes if it is its job or connection, and
# megabytes if it is keys and values (46 kB a token): at a hundred answers a minute some MB, or hundreds. Less than 2 MB
# cannot be told from what the allocator takes and keeps: 0.4 a minute in a try of 15 seconds.
FLAT = 2.0


class Server:
    """`policypatch serve` in a process of its own, for as long as a block."""

    def __init__(self, address: str, process: subprocess.Popen[bytes]):
        self.address, self.process = address, process

    def memory(self) -> float:
        """MB that it holds."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("the system does not say how much memory a process holds")

    @property
    def at_peace(self) -> bool:
        """Whether it ended as it was told to."""
        return self.process.returncode in (0, -signal.SIGTERM)


@contextmanager
def serving(patches: Sequence[Path], waiting: int) -> Iterator[Server]:
    """A server that answers; it has ended when the block has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("policypatch"), "serve", "--dtype", "float32"]
    command += ["--port", port, "--rows", ROWS, "--waiting", waiting]
    command += [part for patch in patches for part in ("--patch", patch)]
    process = subprocess.Popen([str(part) for part in command])
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        for _ in range(600):
            if process.poll() is not None:
                sys.exit(f"the server ended with status {process.returncode} before it answered")
            try:
                urllib.request.urlopen(f"{server.address}/health")
                break
            except OSError:
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def requests_of(models: Sequence[str]) -> list[Request]:
    """Every prompt to every model; kinds and lengths take turns."""
    return [
        Request(model, KINDS[(i + j) % 3], prompt, LENGTHS[(i + 2 * j + j // 2) % 4])
        for i, model in enumerate(models)
        for j, prompt in enumerate(PROMPTS)
    ]


def warm_up(address: str, requests: Sequence[Request], clients: int) -> None:
    """Have every row filled behind every stack, every beginning kept, every client's connection and thread made once.

    What a stack's last two prompts begin with is kept, up to a bound, so a prompt that comes twice in a row is kept
    whole: each of them does here.
    """
    with client_of(address) as client:
        for request in requests:
            for _ in range(2):
                asked(client, request._replace(tokens=1))
    models = list(dict.fromkeys(request.model for request in requests))
    for model in models:  # prompts that differ from their first word on: none is spared reading it by another
        at_once(address, [Request(model, "text", f"{i}. {LONG}", LONG_ANSWER) for i in range(ROWS)])
    at_once(address, [Request(models[0], "chat", PROMPTS[0], 1)] * clients)


def growth(readings: Sequence[tuple[float, float]]) -> float:
    """MB a minute by least squares, from (seconds, MB)."""
    seconds, held = zip(*readings, strict=True)
    return 60 * statistics.linear_regression(seconds, held).slope


def told(crowd: Crowd) -> dict[str, Any]:
    """What came of a crowd's requests."""
    found: dict[str, Any] = {"replies": dict(crowd.counts), "errors": dict(crowd.errors)}
    found["answers_a_second"] = crowd.counts["right"] / crowd.took
    if len(crowd.latencies) > 1:
        latencies = crowd.latencies
        found["latency_s"] = {"median": statistics.median(latencies), "p95": statistics.quantiles(latencies, n=20)[-1]}
    return found


def main() -> None:
    """Start a server, ask alone, ask together, again where few may wait, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patches", nargs="+", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serving.json")
    arguments = parser.parse_args()
    if arguments.clients <= ROWS + FEW:
        parser.error(f"--clients must be more than {ROWS + FEW}, or nobody gets 429")
    names = [load(patch).manifest.name for patch in arguments.patches]
    models = list(dict.fromkeys(["base", *(f"base+{name}" for name in names), "+".join(["base", *names])]))
    with serving(arguments.patches, WAITING) as server:
        with client_of(server.address) as client:
            alone = {request: asked(client, request) for request in requests_of(models)}
        warm_up(server.address, [*alone], arguments.clients)
        crowd = Crowd(server.address, alone)
        readings = crowd.ask(arguments.clients, arguments.seconds, server.memory)
    with serving(arguments.patches, FEW) as busy:
        pressed = Crowd(busy.address, alone)
        pressed.ask(arguments.clients, arguments.seconds / 3, busy.memory)
    slope = growth(readings)
    checks = {
        "all_right": all(not each.counts[bad] for each in (crowd, pressed) for bad in ("wrong", "mixed", "failed")),
        "some_answered": all(each.counts["right"] > 0 for each in (crowd, pressed)),
        "memory_is_flat": slope < FLAT,
        "429_was_seen": pressed.counts["429"] > 0,
        "servers_ended_in_peace": server.at_peace and busy.at_peace,
    }
    result: dict[str, Any] = {
        "clients": arguments.clients,
        "rows": ROWS,
        "seconds": arguments.seconds,
        "different_requests": len(alone),
        "load": {"waiting": WAITING} | told(crowd),
        "memory_mb": {
            "first": readings[0][1],
            "last": readings[-1][1],
            "most": max(held for _, held in readings),
            "growth_a_minute": slope,
            "limit_a_minute": FLAT,
        },
        "load_with_few_waiting": {"waiting": FEW, "seconds": arguments.seconds / 3} | told(pressed),
        "checks": checks,
    } | about("policypatch", "torch", "transformers", "fastapi", "uvicorn", "openai")
    Console().print_json(data=result)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, result)
    if not all(checks.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
