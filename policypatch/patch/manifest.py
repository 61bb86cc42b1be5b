"""The manifest: what a patch says about itself, and the base it is bound to."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema

from policypatch.errors import PolicyPatchError

FORMAT = 1
COST = "cost"  # in the risk's place of a scorecard's rows that say what a patch, or any other arm, costs
LONG, MANY, DEEP = 10_000, 300_000, 32  # entries of a list or dictionary, entries in all, and levels of a manifest
KEY, PLACE = 300, 100  # characters of a key, and of what is said of where it stands


@dataclass(frozen=True)
class BaseIdentity:
    """What a base model is recognised by. Every digest is a sha256 in hex.

    Attributes:
        id: hub id, wheel or folder name it came from.
        revision: hub revision, version or "local".
        embedding: digest of the input embedding matrix, rounded to bfloat16 so that it is the same whether loaded in
            bfloat16 or float32 (float16 rounds otherwise and is another base).
        weights: digest over a sample of every weight tensor, rounded likewise; tells fine-tunes apart.
        config: digest of the architecture's settings that are not its class's defaults.
        tokenizer: digest of the vocabulary and its rules.
        chat_template: digest of the chat template, of the empty string where there is none.
        context: positions that the base has, None where it sets no limit or that is not known.
    """

    id: str
    revision: str
    embedding: str
    weights: str
    config: str
    tokenizer: str
    chat_template: str
    context: int | None = None

    @classmethod
    def digests(cls) -> list[str]:
        """Names of the digests; where a copy came from (id, revision) is none, and `config` covers the context."""
        return [f.name for f in fields(cls) if f.name not in ("id", "revision", "context")]

    def differences(self, other: BaseIdentity) -> list[str]:
        """Names of the digests that differ."""
        return [name for name in self.digests() if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Parent:
    """A patch that this one was stacked from or trained on from."""

    name: str
    version: str
    sha256: str
    base: str | None = None
    """The weights' digest of its own base: vectors that are carried to another one as they stand are another patch."""


@dataclass(frozen=True)
class Manifest:
    """`patch.json`. The schema beside this file says which values are valid."""

    name: str
    version: str
    risks: list[str]
    length: int
    width: int
    base: BaseIdentity
    sha256: str
    created: str
    data_sha256: str | None = None
    parents: list[Parent] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    scorecard: list[dict[str, Any]] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)
    placement: str = "first"
    format: int = FORMAT

    @property
    def as_parent(self) -> Parent:
        """How a patch that comes from this one names it."""
        return Parent(self.name, self.version, self.sha256, self.base.weights)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, checked against the schema."""
        data = asdict(self)
        # As it was read: a signature is over the very bytes.
        for optional, key in [(data["base"], "context"), *((parent, "base") for parent in data["parents"])]:
            if optional[key] is None:
                del optional[key]
        _validate(data, "the manifest")
        return data

    @classmethod
    def from_json(cls, data: Any, where: str) -> Manifest:
        """The manifest in `data`.

        Raises:
            PolicyPatchError: naming `where` and the key that is wrong, missing or unknown, or a newer format.
        """
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
            raise PolicyPatchError(
                f"{where} has format {data['format']} but this policypatch reads up to {FORMAT}: upgrade policypatch"
            )
        _refuse_large(data, where)
        _refuse_odd(data, where)
        _validate(data, where)
        known = dict(data)
        known["base"] = BaseIdentity(**known["base"])
        known["parents"] = [Parent(**parent) for parent in known["parents"]]
        return cls(**known)


def _refuse_large(data: Any, where: str) -> None:
    """Refuse what would take long to be checked, or more than a program's memory or stack.

    Raises:
        PolicyPatchError: a list, a dictionary or the whole has too many entries, a key is too long, or levels too many.
    """
    layer, depth, entries = [("the manifest", data)], 0, 0
    while layer:
        if depth > DEEP:
            raise PolicyPatchError(
                f"{where}: {layer[0][0]} is nested more than {DEEP} deep: no patch has as many levels"
            )
        below: list[tuple[str, Any]] = []
        for name, value in layer:
            if not isinstance(value, list | dict):
                continue
            if len(value) > LONG:
                raise PolicyPatchError(f"{where}: {name} has {len(value):,} entries: no patch has as many")
            if (entries := entries + len(value)) > MANY:
                raise PolicyPatchError(f"{where} has more than {MANY:,} entries in all: no patch has as many")
            if isinstance(value, list):
                below += [(name, each) for each in value]
                continue
            if any(len(key) > KEY for key in value):
                raise PolicyPatchError(f"{where}: {name} has a key of more than {KEY} characters: no patch has such")
            below += [(ascii(key)[1:-1] if depth == 0 else name, each) for key, each in value.items()]
        layer, depth = below, depth + 1


def _refuse_odd(data: Any, where: str) -> None:
    """Refuse what JSON and its schemas let through and a terminal, a file or arithmetic would not.

    Raises:
        PolicyPatchError: half a character or a control character in a key, half a character in a text, a number that
            is not finite or has more than 64 bits, or a whole one of vectors that is written with a point.
    """
    layer = [("the top level", data)]
    while layer:
        place, value = layer.pop()
        if isinstance(value, dict):
            for key in value:
                if not key.isprintable() or not _whole(key):
                    raise PolicyPatchError(f"{where}: a key below {place} is no plain text: {ascii(key)[:100]}")
            # Cut: below long keys, the places of many entries would take more memory than all else.
            layer += [((f"{place}.{key}" if value is not data else key)[:PLACE], each) for key, each in value.items()]
        elif isinstance(value, list):
            layer += [(place, each) for each in value]
        elif isinstance(value, str) and not _whole(value):
            raise PolicyPatchError(f"{where}: {place} is not valid: it holds half a character")
        elif isinstance(value, float) and not math.isfinite(value):
            raise PolicyPatchError(f"{where}: {place} is not valid: {value} is no number")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise PolicyPatchError(f"{where}: {place} is not valid: it has more than 64 bits")
        elif isinstance(value, float) and place in ("format", "length", "width", "base.context"):
            raise PolicyPatchError(f"{where}: {place} is not valid: {value} is not an integer")


def _whole(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _validate(data: Any, where: str) -> None:
    error = jsonschema.exceptions.best_match(_validator().iter_errors(data))
    if error is not None:
        key = ".".join(str(part) for part in error.absolute_path) or "the top level"
        raise PolicyPatchError(f"{where}: {key} is not valid: {error.message[:200]}")


@cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(files("policypatch.patch").joinpath("manifest.schema.json").read_text("utf-8"))
    return jsonschema.Draft202012Validator(schema)
