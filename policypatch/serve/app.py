"""The web server: OpenAI's chat and text completions, `/v1/models`, `/health`, `/metrics`, and a page to compare on."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from policypatch.serve.engine import Job
from policypatch.serve.protocol import Answer, Asked, ChatAsked, CompletionAsked, RefusedError, read
from policypatch.serve.served import Served

BODY_LIMIT = 1 << 20  # bytes
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
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

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return await refused(request, RefusedError(str(error.detail), error.status_code, "not_found"))

    @app.get("/health")
    async def health() -> JSONResponse:
        engine = served.engine
        told = {"status": "ok" if engine.alive else "failed", "running": len(engine.running)}
        return JSONResponse(told | {"waiting": len(engine.queue)}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> PlainTextResponse:
        _authorise(served, request)
        return PlainTextResponse(served.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorise(served, request)
        return {"object": "list", "data": [_model(name) for name in served.models()]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        _authorise(served, request)
        served.stack(name)
        return _model(name)

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


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "policypatch"}


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
    text, ended = "", ""
    watched = asyncio.create_task(_gone(request, job))
    try:
        if asked.stream:
            first = await anext(pieces)  # a refusal still has a status of its own here
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_streamed(job, answer, first, pieces, usage), media_type="text/event-stream")
        async for piece, why in pieces:
            text, ended = text + piece, why or ended
    finally:
        watched.cancel()  # whether a stream is still read, its response sees
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
