"""The part of OpenAI's API that is served: what requests may ask for, and what answers look like."""

from __future__ import annotations

import time
import uuid
from itertools import takewhile
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from policypatch.errors import PolicyPatchError

# Keys that may be there and change nothing here; a value of theirs that would change something is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
Text = Annotated[str, Field(max_length=1 << 20)]


class RefusedError(PolicyPatchError):
    """A request that is answered with an error of this status and code."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request", key: str | None = None):
        super().__init__(message)
        self.status, self.code, self.key = status, code, key

    def body(self) -> dict[str, Any]:
        """As OpenAI writes errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.key, "code": self.code}}


class StreamOptions(BaseModel):
    """Of a stream."""

    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("the body is not an object")
        for key, values in NEUTRAL.items():
            if key in data and data[key] not in values:
                raise ValueError(f"{key}={ascii(data[key])[:40]} is not supported: leave it out")
        gone = {*IGNORED, *NEUTRAL}
        kept = {key: value for key, value in data.items() if key not in gone and value is not None}
        if isinstance(kept.get("stop"), str):
            kept["stop"] = [kept["stop"]]
        return kept


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """Of a chat."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsked(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None

    @property
    def most(self) -> int | None:
        """Tokens that the answer may have."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionAsked(Asked):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)] | list[Annotated[int, Field(ge=0)]]

    @property
    def most(self) -> int | None:
        """Tokens that the answer may have; 16 unless said, as OpenAI has it."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def start(self) -> str | list[int]:
        """What is continued: text, or token ids as they are."""
        if isinstance(self.prompt, list) and len(self.prompt) == 1 and isinstance(self.prompt[0], str):
            return self.prompt[0]
        return self.prompt  # type: ignore[return-value]


def read(kind: type[Asked], body: Any) -> Any:
    """A request of a kind.

    Raises:
        RefusedError: naming the first key that is wrong.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # The branches of a union are pydantic's own names and nothing that a user wrote.
        key = ".".join(takewhile(lambda part: part.replace("_", "").isalnum(), map(str, first["loc"]))) or None
        said = first["msg"].removeprefix("Value error, ")
        raise RefusedError(f"{key}: {said}" if key else said, key=key) from None


class Answer:
    """One answer, whole or in pieces, in the form of its kind of request."""

    def __init__(self, model: str, chat: bool):
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.model, self.chat, self.created = model, chat, int(time.time())

    def whole(self, text: str, why: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer at once."""
        part = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._body(kind, [{"index": 0, "logprobs": None, "finish_reason": why, **part}]) | {"usage": usage}

    def piece(self, text: str | None, why: str | None, first: bool = False) -> dict[str, Any]:
        """A piece of it; the last has a reason and no text."""
        if self.chat:
            delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
            part: dict[str, Any] = {"delta": delta}
        else:
            part = {"text": text or ""}
        return self._body(self._kind, [{"index": 0, "logprobs": None, "finish_reason": why, **part}])

    def total(self, usage: dict[str, int]) -> dict[str, Any]:
        """The piece that says how many tokens there were."""
        return self._body(self._kind, []) | {"usage": usage}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
