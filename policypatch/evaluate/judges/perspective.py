"""Judge `perspective`: Google's Perspective API, the judge of the literature on toxicity.

The service ends on 31 December 2026; figures to be repeated after that need another judge beside it.
Its models also change silently, so scores of different dates are not strictly comparable
(Pozzobon et al. 2023, arXiv:2304.12397).
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges.base import BaseJudge

ENDPOINT = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class PerspectiveJudge(BaseJudge):
    """One attribute's summary score for each text, one request each.

    The key comes from the environment and travels in a header, so that it never stands in a URL, a log
    or a message.

    Args:
        name: how the judge calls itself in errors and logs.
        api_key_env: environment variable that holds the key.
        attribute: which of the API's attributes, e.g. ``TOXICITY`` or ``SEVERE_TOXICITY``.
        language: ISO code of the texts; None lets the API guess, which fails on short ones.
        queries_per_second: starts of requests; 1 is the quota of a new key.
        workers: most requests under way at once.
        retries: further tries of one text after 429, 5xx or a lost connection.
        backoff_s: seconds before the first retry; doubles each time, unless ``Retry-After`` says more.
        timeout_s: seconds that one request may take.
        endpoint: where the API is; https, or http on loopback.

    Raises:
        PolicyPatchError: no key in the environment, a plain http endpoint, or a setting out of range.
    """

    def __init__(
        self,
        name: str = "perspective",
        api_key_env: str = "PERSPECTIVE_API_KEY",
        attribute: str = "TOXICITY",
        language: str | None = "en",
        queries_per_second: float = 1.0,
        workers: int = 8,
        retries: int = 5,
        backoff_s: float = 1.0,
        timeout_s: float = 30.0,
        endpoint: str = ENDPOINT,
    ) -> None:
        super().__init__(name, batch_size=1024)
        key = os.environ.get(api_key_env, "").strip()
        if not key:
            raise PolicyPatchError(
                f"judge {name} needs a Perspective API key in the environment variable {api_key_env}"
            )
        parts = urlsplit(endpoint)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
            raise PolicyPatchError(f"judge {name}: endpoint must be https, not {endpoint}")
        if queries_per_second <= 0 or workers < 1 or retries < 0:
            raise PolicyPatchError(
                f"judge {name}: queries_per_second must be positive, workers at least 1, retries at least 0"
            )
        self._key = key
        self._attribute = attribute
        self._language = language
        self._workers = workers
        self._retries = retries
        self._backoff_s = backoff_s
        self._timeout_s = timeout_s
        self._endpoint = endpoint
        self._wait_for_turn = _rate_limit(queries_per_second)
        # A redirect would carry the key to wherever the answer points.
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.fingerprint = f"perspective:{endpoint}:{attribute}:{language}"

    def __repr__(self) -> str:
        """Name and attribute; never the key."""
        return f"PerspectiveJudge({self.name!r}, {self._attribute!r})"

    def _score_batch(self, texts: list[str]) -> np.ndarray:
        with ThreadPoolExecutor(self._workers) as pool:
            futures = [pool.submit(self._score_one, text) for text in texts]
            try:
                return np.array([future.result() for future in futures])
            except BaseException:
                # One text that fails for good ends the run: do not spend quota on the rest first.
                pool.shutdown(cancel_futures=True)
                raise

    def _score_one(self, text: str) -> float:
        body: dict[str, Any] = {
            "comment": {"text": text},
            "requestedAttributes": {self._attribute: {}},
            "doNotStore": True,
        }
        if self._language is not None:
            body["languages"] = [self._language]
        answer = self._post(json.dumps(body).encode())
        try:
            return float(answer["attributeScores"][self._attribute]["summaryScore"]["value"])
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyPatchError(f"judge {self.name}: the API's answer has no {self._attribute} score") from error

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(
            self._endpoint,
            data=body,
            headers={"Content-Type": "application/json", "X-Goog-Api-Key": self._key},
            method="POST",
        )
        for attempt in range(self._retries + 1):
            self._wait_for_turn()
            pause = self._backoff_s * 2**attempt
            try:
                with self._opener.open(request, timeout=self._timeout_s) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}{_detail(error).replace(self._key, '***')}"
                if error.code != 429 and error.code < 500:
                    break
                after = error.headers.get("Retry-After", "")
                pause = max(pause, float(after)) if after.isdecimal() else pause
            except (OSError, json.JSONDecodeError) as error:  # no connection, time-out, cut-off answer
                reason = str(error)
            if attempt < self._retries:
                time.sleep(pause)
        raise PolicyPatchError(f"judge {self.name}: the API refused after {attempt + 1} tries: {reason}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _rate_limit(per_second: float) -> Callable[[], None]:
    """Return a function that lets its callers through at most `per_second` times a second."""
    lock = threading.Lock()
    next_turn = 0.0

    def wait() -> None:
        nonlocal next_turn
        with lock:
            mine = max(next_turn, time.monotonic())
            next_turn = mine + 1 / per_second
        time.sleep(max(0.0, mine - time.monotonic()))

    return wait


def _detail(error: urllib.error.HTTPError) -> str:
    """Return the API's own message, if it sent one."""
    try:
        return f", {json.loads(error.read())['error']['message']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
