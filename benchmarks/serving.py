"""The server under many clients at once: is every answer the one that a request gets alone, and does memory stay flat?

    python -m benchmarks.serving PATCH [PATCH] [--clients 32] [--seconds 60]

Starts `policypatch serve` for the default base in float32 and asks each request (model x kind x prompt) alone first:
whole chats, streamed chats, and texts that are continued by sampling with a seed. Then each client asks one after the
other, by the official `openai` client, as fast as it is answered. Writes benchmarks/results/serving.json; exits with
1 where an answer was wrong, an error was no 429, memory grew, or the server did not end in peace.
"""

from __future__ import annotations

import argparse
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import openai
from rich.console import Console

from benchmarks.about import about
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


Request = tuple[str, str, str]  # model, kind, prompt


def asked(client: openai.OpenAI, request: Request, tokens: int) -> str:
    """The answer to one request."""
    model, kind, prompt = request
    if kind == "text":
        text = client.completions.create(
            model=model, prompt=prompt, temperature=0.8, top_p=0.9, seed=1, max_tokens=tokens
        )
        return text.choices[0].text
    messages: list[Any] = [{"role": "user", "content": prompt}]
    if kind == "chat":
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=tokens)
        return str(answer.choices[0].message.content)
    pieces = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=tokens, stream=True
    )
    return "".join(piece.choices[0].delta.content or "" for piece in pieces)


def memory(pid: int) -> float:
    """MB that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not say how much memory a process holds")


class Load:
    """What the clients saw."""

    def __init__(self, address: str, expected: dict[Request, str], lengths: dict[Request, int]):
        self.address, self.expected, self.lengths = address, expected, lengths
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.lock = threading.Lock()

    def client(self, number: int, until: float) -> None:
        """One client: ask until the time is up, and count what comes back."""
        rng = random.Random(number)
        requests = list(self.expected)
        with openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120) as client:
            while time.monotonic() < until:
                request, start = rng.choice(requests), time.monotonic()
                try:
                    text = asked(client, request, self.lengths[request])
                    outcome = "right" if text == self.expected[request] else "wrong"
                except openai.RateLimitError:
                    outcome = "429"
                    time.sleep(0.2)
                except openai.OpenAIError as error:
                    outcome = f"error: {type(error).__name__}"
                with self.lock:
                    self.counts[outcome] += 1
                    if outcome == "right":
                        self.seconds.append(time.monotonic() - start)


def main() -> None:
    """Start the server, ask alone, ask together, say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patches", nargs="+", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("policypatch"), "serve", "--port", port, "--dtype", "float32"]
    command += [part for patch in arguments.patches for part in ("--patch", patch)]
    server = subprocess.Popen([str(part) for part in command])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                sys.exit(f"the server ended with status {server.returncode} before it answered")
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(0.2)
        names = [load(patch).manifest.name for patch in arguments.patches]
        models = ["base", *(f"base+{name}" for name in names), "+".join(["base", *names])]
        kinds = ("chat", "stream", "text")
        lengths = {
            (model, kinds[(i + j) % 3], prompt): 8 + 8 * ((i + 2 * j) % 3)
            for i, model in enumerate(models)
            for j, prompt in enumerate(PROMPTS)
        }
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            expected = {request: asked(client, request, tokens) for request, tokens in lengths.items()}
        load_ = Load(address, expected, lengths)
        until, held = time.monotonic() + arguments.seconds, [memory(server.pid)]
        threads = [threading.Thread(target=load_.client, args=(i, until)) for i in range(arguments.clients)]
        for thread in threads:
            thread.start()
        while time.monotonic() < until:
            time.sleep(1)
            held.append(memory(server.pid))
        for thread in threads:
            thread.join()
    finally:
        server.terminate()
        ended = server.wait(60)
    third = len(held) // 3
    result: dict[str, Any] = {
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "answers": dict(load_.counts),
        "different_requests": len(expected),
        "answers_a_second": load_.counts["right"] / arguments.seconds,
        "latency_s": {
            "median": statistics.median(load_.seconds),
            "p95": statistics.quantiles(load_.seconds, n=20)[-1],
        },
        "memory_mb": {
            "before": held[0],
            "mean_of_the_second_third": statistics.mean(held[third : 2 * third]),
            "mean_of_the_last_third": statistics.mean(held[2 * third :]),
        },
        "exit_status": ended,
    } | about("policypatch", "torch", "transformers", "fastapi", "uvicorn", "openai")
    Console().print_json(data=result)
    (ROOT / "results").mkdir(exist_ok=True)
    write_json(ROOT / "results" / "serving.json", result)
    grown = result["memory_mb"]["mean_of_the_last_third"] / result["memory_mb"]["mean_of_the_second_third"]
    if set(load_.counts) - {"right", "429"} or grown > 1.02 or ended not in (0, -signal.SIGTERM):
        sys.exit(1)


if __name__ == "__main__":
    main()
