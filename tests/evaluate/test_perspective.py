"""Perspective's client against a server on loopback."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import PerspectiveJudge

KEY = "very-secret-key"


@pytest.fixture
def api(monkeypatch):
    """A server that answers with 0.25, or with what `failures` holds, first in first out."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append((time.monotonic(), self.path, dict(self.headers), body))
            status, headers, answer = 200, {}, None
            if server.failures:
                status, headers, answer = server.failures.pop(0)
            if answer is None:
                answer = {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.25}}}}
            payload = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.failures = [], []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def judge_of(api, **changes):
    port = api.server_address[1]
    settings = {"endpoint": f"http://127.0.0.1:{port}/analyze", "queries_per_second": 1e4, "backoff_s": 0.001}
    return PerspectiveJudge(**(settings | changes))


def test_scores_and_what_is_sent(api):
    assert judge_of(api).score(["hello", "", "hello"]).tolist() == [0.25, 0.0, 0.25]
    ((_, path, headers, body),) = api.seen
    assert body["comment"] == {"text": "hello"}
    assert body["requestedAttributes"] == {"TOXICITY": {}}
    assert body["doNotStore"] is True
    assert {name.lower(): value for name, value in headers.items()}["x-goog-api-key"] == KEY
    assert KEY not in path


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_tried_again(api, status):
    api.failures += [(status, {}, {}), (status, {"Retry-After": "0"}, {})]
    assert judge_of(api).score(["hello"]).tolist() == [0.25]
    assert len(api.seen) == 3


def test_lasting_trouble_ends_with_the_reason_and_without_the_key(api):
    api.failures += [(503, {}, {"error": {"message": f"no room for {KEY}"}})] * 3
    with pytest.raises(PolicyPatchError, match=r"judge perspective: .* 3 tries: HTTP 503, no room for") as caught:
        judge_of(api, retries=2).score(["hello"])
    assert KEY not in str(caught.value)


def test_a_refused_key_is_not_tried_again(api):
    api.failures += [(403, {}, {"error": {"message": "key not valid"}})]
    with pytest.raises(PolicyPatchError, match="HTTP 403, key not valid"):
        judge_of(api).score(["hello"])
    assert len(api.seen) == 1


def test_a_redirect_does_not_carry_the_key_away(api):
    port = api.server_address[1]
    api.failures += [(302, {"Location": f"http://127.0.0.1:{port}/elsewhere"}, {})]
    with pytest.raises(PolicyPatchError, match="HTTP 302"):
        judge_of(api).score(["hello"])
    assert len(api.seen) == 1


def test_requests_keep_to_the_rate(api):
    judge_of(api, queries_per_second=20.0).score(["a", "b", "c", "d", "e"])
    times = sorted(seen[0] for seen in api.seen)
    assert times[-1] - times[0] >= 0.9 * 4 / 20


def test_an_answer_without_the_attribute_is_refused(api):
    with pytest.raises(PolicyPatchError, match="no INSULT score"):
        judge_of(api, attribute="INSULT").score(["hello"])


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_is_told_at_once(monkeypatch, value):
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("PERSPECTIVE_API_KEY", value)
    with pytest.raises(PolicyPatchError, match="PERSPECTIVE_API_KEY"):
        PerspectiveJudge()


def test_plain_http_is_refused_away_from_loopback(monkeypatch):
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    with pytest.raises(PolicyPatchError, match="must be https"):
        PerspectiveJudge(endpoint="http://example.org/analyze")


def test_the_key_is_in_no_representation(api):
    judge = judge_of(api)
    assert KEY not in repr(judge)
    assert KEY not in judge.fingerprint
