"""`policypatch serve`: the base and its patches behind OpenAI's API."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from policypatch.commands.base import MODEL, Register, base_of, tell_odd_norms
from policypatch.errors import PolicyPatchError

console = Console(soft_wrap=True, highlight=False)
KEY_LENGTH = 16  # characters that a key must have at least
SPARE = 1000  # connections beside those that are answered or wait, before a request on one gets 503


def register(add: Register) -> None:
    """Add the command."""
    add(serve)


def serve(
    model: Annotated[str, typer.Option(help=MODEL)] = "smollm2_135m",
    patch: Annotated[list[Path] | None, typer.Option(help="a patch's folder; may be given several times")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any free one", min=0, max=65535)] = 8000,
    name: Annotated[
        list[str] | None,
        typer.Option(help="host that requests may name beside the loopback; any, beyond it, where none is given"),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file with the key that requests must bring; needed beyond the loopback")
    ] = None,
    rows: Annotated[int, typer.Option(help="requests answered at once", min=1, max=1024)] = 16,
    waiting: Annotated[int, typer.Option(help="requests that may wait before others get 429", min=1)] = 64,
    context: Annotated[int, typer.Option(help="tokens a request may take, where the base has as many", min=2)] = 2048,
    dtype: Annotated[
        str,
        typer.Option(help="auto, float32, bfloat16 or float16; in float32 an answer does not depend on the others"),
    ] = "auto",
    key: Annotated[Path | None, typer.Option(help="public key that must have signed each patch")] = None,
    allow_mismatch: Annotated[list[str] | None, typer.Option(help="digest of the base that may differ")] = None,
) -> None:
    """Serve a base and its patches: chats, completions, and a page that shows answers side by side."""
    from policypatch.patch import artifact

    try:
        import uvicorn

        from policypatch.serve.app import LOOPBACK, create_app
        from policypatch.serve.engine import Engine
        from policypatch.serve.served import Served
    except ImportError as error:
        raise PolicyPatchError(f"serving needs the package {error.name}: pip install 'policypatch[serve]'") from None
    secret = _secret(api_key_file)
    if not _is_loopback(host) and secret is None:
        raise PolicyPatchError(f"{host} can be reached from elsewhere: give a key by --api-key-file, or keep 127.0.0.1")
    artifact.check_names(allow_mismatch or ())
    loaded = [artifact.load(folder, require_signature=key) for folder in patch or ()]
    names = [each.manifest.name for each in loaded]
    if twice := [each for each in names if names.count(each) > 1]:
        raise PolicyPatchError(f"two patches are called {twice[0]}: serve one of them, as requests choose by name")
    base = base_of(model, dtype)
    for each in loaded:
        artifact.check_base(each.manifest, base.identity, allow_mismatch or (), each.manifest.name, base.width)
    tell_odd_norms(loaded, base)
    engine = Engine(base, {each.manifest.name: each.vectors for each in loaded}, rows, context, waiting)
    served = Served(engine, {each.manifest.name: each.manifest for each in loaded}, secret)
    anyone = not _is_loopback(host) and not name  # a key is asked for, so that other sites' pages get nothing
    own = f"[{host}]" if ":" in host else host
    app = create_app(served, ["*"] if anyone else [*LOOPBACK, own, *(name or ())])
    console.print(f"models: {', '.join(served.models())}", markup=False)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=10,
        server_header=False,
        limit_concurrency=rows + waiting + SPARE,  # each may bring a body, which takes memory before it is refused
    )


def _secret(path: Path | None) -> str | None:
    """The API key, from a file or from POLICYPATCH_API_KEY: a command line can be read by others."""
    if path is None:
        secret = os.environ.get("POLICYPATCH_API_KEY")
    else:
        try:
            secret = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyPatchError(f"--api-key-file: {path} cannot be read: {error}") from error
    if secret is not None and len(secret) < KEY_LENGTH:
        raise PolicyPatchError(f"the API key has {len(secret)} characters: use {KEY_LENGTH} or more")
    return secret


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        raise PolicyPatchError(f"--host is {host!r}: give an address, as 127.0.0.1 or 0.0.0.0") from None
