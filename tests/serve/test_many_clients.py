"""Many clients at once over HTTP: each gets the answer that its request gets alone, and no error but 429."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import openai
import pytest
from tiny_server import listening

from policypatch.serve.engine import Engine

CLIENTS = 32
EACH = 3  # requests that a client asks one after the other
TRIES = 400  # of a request that gets 429, 50 ms apart
MODELS = ("base", "base+tox", "base+tox+bias", "base+bias+tox")
PROMPTS = ("Hi", "The harbour was quiet", "Who voted in winter?", "A map of the valley and of the river, please")
KINDS = ("chat", "chat stream", "text", "text stream")


class Request(NamedTuple):
    """What a client asks for."""

    model: str
    kind: str
    prompt: str
    tokens: int


# Every model answers every prompt, and is asked in every kind; lengths differ, so that rows come and go between others.
REQUESTS = [
    Request(model, KINDS[(i + j) % 4], prompt, 4 + (5 * i + 7 * j) % 17)
    for i, model in enumerate(MODELS)
    for j, prompt in enumerate(PROMPTS)
]


def asked(client: openai.OpenAI, request: Request) -> str:
    options = {"model": request.model, "temperature": 0, "max_tokens": request.tokens}
    options["stream"] = streamed = request.kind.endswith("stream")
    if request.kind.startswith("text"):
        found = client.completions.create(prompt=request.prompt, **options)
        texts = [piece.choices[0].text for piece in (found if streamed else [found])]
    else:
        found = client.chat.completions.create(messages=[{"role": "user", "content": request.prompt}], **options)
        if not streamed:
            return found.choices[0].message.content
        texts = [piece.choices[0].delta.content or "" for piece in found]
    return "".join(texts)


def together(ask: Callable[[Request], str], requests: list[list[Request]]) -> list[list[str]]:
    """What each client got for its requests; all begin at once."""
    ready = threading.Barrier(len(requests))

    def one(mine: list[Request]) -> list[str]:
        ready.wait(30)
        return [ask(request) for request in mine]

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, requests))


@pytest.fixture
def client(tiny_base, engine: Engine):
    with (
        listening(tiny_base, engine) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.fixture
def alone(client: openai.OpenAI) -> dict[Request, str]:
    """The answer to each request while there is no other, and few that two of them share: a mix-up would show."""
    found = {request: asked(client, request) for request in REQUESTS}
    assert len(set(found.values())) > len(REQUESTS) - 3
    return found


def test_each_of_many_clients_gets_what_it_gets_alone(client: openai.OpenAI, alone, engine: Engine, monkeypatch):
    sizes, step = [], engine.slots.step
    monkeypatch.setattr(engine.slots, "step", lambda tokens: (sizes.append(len(tokens)), step(tokens))[1])
    engine.waiting = CLIENTS
    asking = [[REQUESTS[(i + 5 * k) % len(REQUESTS)] for k in range(EACH)] for i in range(CLIENTS)]
    answers = together(lambda request: asked(client, request), asking)
    assert answers == [[alone[request] for request in mine] for mine in asking]
    assert max(sizes) == engine.slots.rows  # they did share a batch
    assert not engine.running and not engine.queue


def test_whoever_gets_429_and_asks_again_gets_the_right_answer(
    client: openai.OpenAI, alone, engine: Engine, monkeypatch
):
    refused, turn = threading.Event(), engine.round

    def round_() -> None:
        assert refused.wait(30)  # nothing is answered until the queue was full for somebody
        turn()

    def ask(request: Request) -> str:
        for _ in range(TRIES):
            try:
                return asked(client, request)
            except openai.RateLimitError as error:
                assert error.response.headers["retry-after"] == "1"
                refused.set()
                time.sleep(0.05)
        raise AssertionError(f"{request} was refused {TRIES} times")

    engine.waiting = 2
    monkeypatch.setattr(engine, "round", round_)
    asking = [[REQUESTS[i % len(REQUESTS)]] for i in range(CLIENTS)]
    answers = together(ask, asking)
    assert refused.is_set()
    assert answers == [[alone[request] for request in mine] for mine in asking]
