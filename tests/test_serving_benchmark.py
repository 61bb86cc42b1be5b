"""What `benchmarks/serving.py` counts: right, mixed and wrong replies, 429, failures, and how memory grows."""

import sys

import openai
import pytest
from tiny_run import ROOT
from tiny_server import listening

from policypatch.model.base import Base
from policypatch.serve.engine import Engine

sys.path.insert(0, str(ROOT))
from benchmarks.clients import Crowd, Request, asked, at_once, client_of, verdict
from benchmarks.serving import LENGTHS, PROMPTS, growth, requests_of

REQUESTS = [
    Request("base", "chat", "Hi", 8),
    Request("base", "stream", "The harbour", 8),
    Request("base", "text", "A train", 8),
]


@pytest.fixture
def address(tiny_base: Base):
    with listening(tiny_base, Engine(tiny_base, {}, rows=2, context=128, waiting=1)) as address:
        yield address


def replies(address: str) -> dict[Request, str]:
    with client_of(address) as client:
        return {request: asked(client, request) for request in REQUESTS}


def test_verdicts():
    alone = dict(zip(REQUESTS, ("one", "two", "two"), strict=True))
    said = [verdict(reply, REQUESTS[1], alone) for reply in ("two", "one", "onetwo", "")]
    assert said == ["right", "mixed", "wrong", "wrong"]


def test_growth_is_the_slope_of_the_line():
    assert growth([(0, 100), (1, 101), (2, 102)]) == pytest.approx(60)
    # By hand: mean (1.5, 2), sum of products 1.5 * 2 - 0.5 * 2 - 0.5 * 2 + 1.5 * 2 = 4, of squares 5: 0.8 a second.
    assert growth([(0, 0), (1, 4), (2, 0), (3, 4)]) == pytest.approx(48)


def test_every_model_is_asked_in_all_kinds_and_lengths():
    requests = requests_of(["base", "base+a", "base+a+b"])
    assert len(set(requests)) == 3 * len(PROMPTS)
    for model in ("base", "base+a", "base+a+b"):
        mine = [request for request in requests if request.model == model]
        assert {request.kind for request in mine} == {"chat", "stream", "text"}
        assert {request.tokens for request in mine} == set(LENGTHS)


def test_a_crowd_counts_right_replies_and_429(address: str):
    crowd = Crowd(address, replies(address))
    readings = crowd.ask(8, 1.2, lambda: 5.0)
    assert crowd.counts["right"] == len(crowd.latencies) > 0 and crowd.counts["429"] > 0
    assert not crowd.errors and not any(crowd.counts[bad] for bad in ("wrong", "mixed", "failed"))
    assert {held for _, held in readings} == {5.0} and len(readings) >= 3
    assert crowd.took >= readings[-1][0] >= 1.2


def test_a_crowd_counts_what_is_not_right(address: str):
    first, second, _ = replies(address).values()
    for alone, outcome in (({REQUESTS[0]: first + "!"}, "wrong"), ({REQUESTS[0]: second, REQUESTS[1]: first}, "mixed")):
        crowd = Crowd(address, alone)
        crowd.ask(1, 0.3, lambda: 0.0)
        assert crowd.counts[outcome] == crowd.counts.total() > 0


def test_a_crowd_counts_failures_by_their_kind():
    crowd = Crowd("http://127.0.0.1:9", dict.fromkeys(REQUESTS, ""))
    crowd.ask(1, 0.3, lambda: 0.0)
    assert crowd.counts["failed"] == crowd.errors["APIConnectionError"] > 0


def test_a_warm_up_that_is_refused_is_told(address: str):
    with pytest.raises(openai.NotFoundError):
        at_once(address, [Request("gpt", "text", "Hi", 1)])
