"""What a server serves: from a request to the engine's job, and from its pieces to an answer."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping

from policypatch.errors import PolicyPatchError
from policypatch.model.sampling import Sampling
from policypatch.patch.manifest import Manifest
from policypatch.serve.engine import BusyError, Engine, Job
from policypatch.serve.metrics import Metrics
from policypatch.serve.protocol import ChatAsked, CompletionAsked, RefusedError

PLAIN = "base"  # the model without a patch
LONGEST_TOKEN = 64  # characters: a text of more for each token of the context is refused before it is read


class Served:
    """A base, its patches, and who may ask.

    Args:
        engine: that answers.
        manifests: of its patches, by name.
        key: that requests must bring as a bearer token; None asks for none.
    """

    def __init__(self, engine: Engine, manifests: Mapping[str, Manifest], key: str | None = None):
        self.engine, self.manifests, self.key = engine, manifests, key
        self.metrics = Metrics(engine)
        tokenizer = engine.base.tokenizer
        self._special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokenizer("A text.")  # settings of its file that a first call changes are changed before threads share it

    def stack(self, model: str) -> tuple[str, ...]:
        """The patches that a model's name asks for: base, base+tox, base+tox+bias.

        Raises:
            RefusedError: no such model.
        """
        first, *names = model.split("+")
        if first != PLAIN or any(name not in self.engine.patches for name in names) or len(set(names)) < len(names):
            known = ", ".join([PLAIN, *(f"{PLAIN}+{name}" for name in self.engine.patches)])
            raise RefusedError(
                f"there is no model {model[:100]!a}: choose from {known}, or join different patches by +",
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
            RefusedError: a model that is not there, a prompt that does not fit, or a queue that is full.
        """
        stack = self.stack(asked.model)
        if self.engine.full:
            raise _busy("the queue is full: try again in a moment")  # before the work of reading the prompt
        try:
            prompt = self._chat(asked) if isinstance(asked, ChatAsked) else self._text(asked)
        except PolicyPatchError as error:
            if isinstance(error, RefusedError):
                raise
            raise RefusedError(str(error)) from None
        try:
            most = self.engine.check(prompt, stack, asked.most)
        except PolicyPatchError as error:
            raise RefusedError(str(error), code="context_length_exceeded") from None
        sampling = Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            max_new_tokens=most,
        )
        return Job(prompt, stack, sampling, secrets.randbits(63) if asked.seed is None else asked.seed, asked.stop)

    def _chat(self, asked: ChatAsked) -> list[int]:
        messages = [message.plain() for message in asked.messages]
        self._refuse_long("".join(message["content"] for message in messages))
        for i, message in enumerate(messages):
            for token in self._special:
                if token in message["content"]:
                    raise RefusedError(
                        f"messages.{i}.content holds {token}, by which a chat's parts are told apart: leave it out",
                        key="messages",
                    )
        return self.engine.base.encode_messages(messages)

    def _text(self, asked: CompletionAsked) -> list[int]:
        if isinstance(asked.start, str):
            self._refuse_long(asked.start)
            return self.engine.base.encode_prompt(asked.start)
        size = self.engine.base.embedding.shape[0]
        if any(token >= size for token in asked.start):
            raise RefusedError(f"prompt: this base has tokens 0 to {size - 1}", key="prompt")
        return asked.start

    def _refuse_long(self, text: str) -> None:
        if len(text) > LONGEST_TOKEN * self.engine.context:
            raise RefusedError(
                f"{len(text)} characters do not fit a context of {self.engine.context} tokens: shorten the prompt",
                code="context_length_exceeded",
            )

    async def run(self, job: Job) -> AsyncIterator[tuple[str, str | None]]:
        """Pieces of the answer as they come; the last has the reason why it ended.

        Raises:
            RefusedError: too many wait already, the server is stopping, or the engine failed.
        """
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[str, str | None]]()

        def tell(text: str, why: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (text, why))

        job.tell = tell
        try:
            self.engine.submit(job)
        except BusyError as error:
            if self.engine.stopping:
                raise _stopping() from None
            raise _busy(str(error)) from None
        try:
            while True:
                text, why = await pieces.get()
                if why == "error":
                    raise RefusedError("the model failed on this request; the server's log says more", 500, "failed")
                if why == "cancelled":
                    raise _stopping()
                if why is not None:  # before it is handed on: who reads a stream need not come back for more
                    self.metrics.answered(job)
                yield text, why
                if why is not None:
                    return
        finally:
            job.cancelled = True  # of no effect on one that has ended


def _busy(message: str) -> RefusedError:
    return RefusedError(message, 429, "server_busy")


def _stopping() -> RefusedError:
    return RefusedError("the server is stopping", 503, "stopping")
