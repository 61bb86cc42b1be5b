"""A real server on the loopback, for as long as a test asks it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from tiny_run import patch_of

from policypatch.model.base import Base
from policypatch.serve.app import create_app
from policypatch.serve.engine import Engine
from policypatch.serve.served import Served


@contextmanager
def listening(base: Base, engine: Engine, key: str | None = None) -> Iterator[str]:
    """The address of a server of this engine, whose patches are made up."""
    manifests = {name: patch_of(base, name, 10).manifest for name in engine.patches}
    server = uvicorn.Server(uvicorn.Config(create_app(Served(engine, manifests, key)), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
