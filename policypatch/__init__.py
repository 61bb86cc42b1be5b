"""Patch a language model's safety policy the way one patches software.

import policypatch

model = policypatch.apply(model, "tox/patch", "bias/patch", tokenizer=tokenizer)
with policypatch.using(model, None):   # the plain base, for a while
    ...
policypatch.remove(model)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policypatch.api import Patch, PolicyPatchError, apply, load, remove, save, stack, using

__all__ = ["Patch", "PolicyPatchError", "apply", "load", "remove", "save", "stack", "using"]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: torch and transformers take seconds."""
    if name == "__version__":
        from importlib.metadata import version

        return version("policypatch")
    if name not in __all__:
        raise AttributeError(f"module 'policypatch' has no attribute {name!r}")
    from policypatch import api

    return getattr(api, name)
