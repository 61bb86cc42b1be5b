"""Clients of a server, all at once: every reply is held against the one that its request gets alone."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openai

OUTCOMES = ("right", "429", "wrong", "mixed", "failed")
AGAIN = 0.2  # seconds after a 429


class Request(NamedTuple):
    """What a client asks for; `kind` is chat, stream (a chat in pieces) or text (sampled with a seed)."""

    model: str
    kind: str
    prompt: str
    tokens: int


def client_of(address: str) -> openai.OpenAI:
    """The official client, which asks once and gives up after two minutes."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def asked(client: openai.OpenAI, request: Request) -> str:
    """The reply to one request."""
    model, kind, prompt, tokens = request
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


def verdict(reply: str, request: Request, alone: Mapping[Request, str]) -> str:
    """right; mixed, where it is another request's reply; or wrong."""
    if reply == alone[request]:
        return "right"
    return "mixed" if reply in alone.values() else "wrong"


def at_once(address: str, requests: Sequence[Request]) -> None:
    """Have all of them answered, each asked by a client of its own, and pass over what they get."""

    def one(request: Request) -> None:
        with client_of(address) as client:
            asked(client, request)

    with ThreadPoolExecutor(len(requests)) as pool:
        list(pool.map(one, requests))


class Crowd:
    """Clients that each ask one request after the other, as fast as they are answered.

    Args:
        address: of the server.
        alone: the reply to each request that they choose from, asked for by itself.
    """

    def __init__(self, address: str, alone: Mapping[Request, str]):
        self.address, self.alone = address, alone
        self.counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.errors: Counter[str] = Counter()
        self.latencies: list[float] = []  # seconds of right replies
        self.took = 0.0  # seconds until the last reply
        self._lock = threading.Lock()

    def ask(self, clients: int, seconds: float, read: Callable[[], float]) -> list[tuple[float, float]]:
        """Ask for so long; (seconds since the start, `read()`) once a second and at the end of that time."""
        start = time.monotonic()
        threads = [threading.Thread(target=self._client, args=(i, start + seconds)) for i in range(clients)]
        for thread in threads:
            thread.start()
        readings = [(0.0, read())]
        while (left := start + seconds - time.monotonic()) > 0:
            time.sleep(min(1, left))
            readings.append((time.monotonic() - start, read()))
        for thread in threads:
            thread.join()
        self.took = time.monotonic() - start
        return readings

    def _client(self, number: int, until: float) -> None:
        rng, requests = random.Random(number), list(self.alone)
        with client_of(self.address) as client:
            while time.monotonic() < until:
                request, start = rng.choice(requests), time.monotonic()
                error = None
                try:
                    outcome = verdict(asked(client, request), request, self.alone)
                except openai.RateLimitError:
                    outcome = "429"
                except Exception as failed:  # of whatever layer: a thread that died of it would be counted nowhere
                    outcome, error = "failed", type(failed).__name__
                with self._lock:
                    self.counts[outcome] += 1
                    if error:
                        self.errors[error] += 1
                    if outcome == "right":
                        self.latencies.append(time.monotonic() - start)
                if outcome in ("429", "failed"):
                    time.sleep(AGAIN)
