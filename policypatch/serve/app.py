"""The web server: OpenAI's chat and text completions, `/v1/models`, `/health`, `/metrics`, and a page to compare on."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.middleware.trustedhost import TrustedHostMiddleware

from policypatch.errors import PolicyPatchError
from policypatch.model.sampling import Sampling
from policypatch.patch.manifest import Manifest
from policypatch.serve.engine import BusyError, Engine, Job
from policypatch.serve.metrics import Metrics
from policypatch.serve.protocol import Answer, Asked, ChatAsked, CompletionAsked, RefusedError, read

BODY_LIMIT = 1 << 20  # bytes
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "testserver")
PLAIN = "base"  # the model without a patch
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Served:
    """What one server serves.

    Args:
        engine: that answers.
        manifests: of its patches, by name.
        key: that requests must bring as a bearer token; None asks for none.
    """

    def __init__(self, engine: Engine, manifests: Mapping[str, Manifest], key: str | None = None):
        self.engine, self.manifests, self.key = engine, manifests, key
        self.metrics = Metrics(engine)

    def stack(self, model: str) -> tuple[str, ...]:
        """The patches that a model's name asks for: base, base+tox, base+tox+bias.

        Raises:
            RefusedError: no such model.
        """
        first, *names = model.split("+")
        if first != PLAIN or any(name not in self.engine.patches for name in names):
            known = ", ".join([PLAIN, *(f"{PLAIN}+{name}" for name in self.engine.patches)])
            raise RefusedError(
                f"there is no model {model[:100]!r}: choose from {known}, or join patches by +",
                404,
                "model_not_found",
                "model",
            )
        return tuple(names)

    def models(self) -> list[str]:
        """The base, with each patch, and with all of them."""
        names = list(self.engine.patches)
        return [PLAIN, *(f"{PLAIN}+{name}" for name in names)] + (["+".join([PLAIN, *names])] if len(names) > 1 else [])

    def job(self, asked: ChatAsked | CompletionAsked) -> Job:
        """What the engine is to do.

        Raises:
            RefusedError: a model that is not there, or a prompt that does not fit.
        """
        stack, base = self.stack(asked.model), self.engine.base
        try:
            if isinstance(asked, ChatAsked):
                messages = [message.plain() for message in asked.messages]
                if not base.tokenizer.chat_template:
                    raise RefusedError("this base has no chat template: use /v1/completions")
                text = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                prompt = base.encode(text)
            else:
                prompt = base.encode_prompt(asked.text)
            most = self.engine.check(prompt, stack, asked.most)
        except TemplateError as error:
            raise RefusedError(f"the base's chat template refuses these messages: {error}", key="messages") from None
        except PolicyPatchError as error:
            if isinstance(error, RefusedError):
                raise
            raise RefusedError(str(error), code="context_length_exceeded") from None
        sampling = Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            max_new_tokens=most,
        )
        return Job(prompt, stack, sampling, secrets.randbits(63) if asked.seed is None else asked.seed, asked.stop)

    async def run(self, job: Job) -> AsyncIterator[tuple[str, str | None]]:
        """Pieces of the answer as they come; the last has the reason why it ended.

        Raises:
            RefusedError: too many wait already, or the engine failed.
        """
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[str, str | None]]()

        def tell(text: str, why: str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (text, why))

        job.tell = tell
        try:
            self.engine.submit(job)
        except BusyError as error:
            raise RefusedError(str(error), 429, "server_busy") from None
        try:
            while True:
                text, why = await pieces.get()
                if why == "error":
                    raise RefusedError("the model failed on this request; the server's log says more", 500, "failed")
                if why == "cancelled":
                    raise RefusedError("the server is stopping", 503, "stopping")
                yield text, why
                if why is not None:
                    self.metrics.answered(job)
                    return
        finally:
            job.cancelled = True  # of no effect on one that has ended


def create_app(served: Served, hosts: list[str] | None = None) -> FastAPI:
    """The application.

    Args:
        served: what it serves; its engine runs while the application does.
        hosts: names that requests may call this server by; None is the loopback's. Another site's page, which can make
            a browser call a loopback server by a name of its own, is kept out so.
    """

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        yield
        await asyncio.to_thread(served.engine.stop)

    app = FastAPI(title="policypatch", lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts or list(LOOPBACK))

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        served.metrics.refused(error.status)
        return JSONResponse(error.body(), error.status, {"retry-after": "1"} if error.status == 429 else None)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        engine = served.engine
        return {"status": "ok", "running": len(engine.running), "waiting": len(engine.queue)}

    @app.get("/metrics")
    async def metrics(request: Request) -> PlainTextResponse:
        _authorise(served, request)
        return PlainTextResponse(served.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorise(served, request)
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "policypatch"} for name in served.models()]
        return {"object": "list", "data": listed}

    @app.get("/patches")
    async def patches(request: Request) -> dict[str, Any]:
        """What the page says of each patch."""
        _authorise(served, request)
        told = {
            name: {"version": m.version, "risks": m.risks, "length": m.length} for name, m in served.manifests.items()
        }
        return {"base": served.engine.base.identity.id, "models": served.models(), "patches": told}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(served, request, ChatAsked)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _answer(served, request, CompletionAsked)

    for path, (name, kind) in PAGE.items():
        _page(app, path, name, kind)
    return app


def _page(app: FastAPI, path: str, name: str, kind: str) -> None:
    content = files("policypatch.serve").joinpath("page", name).read_bytes()

    @app.get(path)
    async def page() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)


def _authorise(served: Served, request: Request) -> None:
    if served.key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), served.key.encode()):
        raise RefusedError("the API key is missing or wrong", 401, "invalid_api_key")


async def _body(request: Request) -> Any:
    """The JSON that a request brings; a form of another site's page is none."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError("the body must be application/json", 415)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > BODY_LIMIT:
            raise RefusedError(f"the body has more than {BODY_LIMIT} bytes", 413)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise RefusedError("the body is not JSON") from None


async def _answer(served: Served, request: Request, kind: type[Asked]) -> Response:
    _authorise(served, request)
    asked = read(kind, await _body(request))
    job = await asyncio.to_thread(served.job, asked)
    answer, pieces = Answer(asked.model, kind is ChatAsked), served.run(job)
    if asked.stream:
        first = await anext(pieces)  # a refusal still has a status of its own here
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(_streamed(job, answer, first, pieces, usage), media_type="text/event-stream")
    text, ended = "", ""
    watched = asyncio.create_task(_gone(request, job))
    try:
        async for piece, why in pieces:
            text, ended = text + piece, why or ended
    finally:
        watched.cancel()
    return JSONResponse(answer.whole(text, ended, _usage(job)))


async def _gone(request: Request, job: Job) -> None:
    """Give up what nobody waits for any more."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)
    job.cancelled = True


async def _streamed(
    job: Job, answer: Answer, first: tuple[str, str | None], pieces: AsyncIterator[tuple[str, str | None]], usage: bool
) -> AsyncIterator[str]:
    """Server-sent events."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    try:
        text, why = first
        yield event(answer.piece(text, None, first=True))
        try:
            while why is None:
                text, why = await anext(pieces)
                if text:
                    yield event(answer.piece(text, None))
        except RefusedError as error:
            yield event(error.body())
            return
        yield event(answer.piece(None, why))
        if usage:
            yield event(answer.total(_usage(job)))
        yield "data: [DONE]\n\n"
    finally:
        job.cancelled = True


def _usage(job: Job) -> dict[str, int]:
    """Tokens of the prompt as the tokenizer counts them (a patch has none) and of the answer."""
    prompt, written = len(job.prompt), len(job.written)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
