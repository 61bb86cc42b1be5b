"""Where a prompt comes from, as its user knows it: a file and a row of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from policypatch.data.prompts import PromptSet
from policypatch.errors import AtPrompt


def file_and_row(section: Any, text: str) -> str | None:
    """The file and row of a text of the prompt sets in a section of the config; None where it is in none of them."""
    if not isinstance(section, DictConfig):
        return None
    if str(section.get("_target_")).endswith(".PromptSet"):
        prompt_set: PromptSet = instantiate(section)
        return prompt_set.place_of(text)
    return next((place for inner in section.values() if (place := file_and_row(inner, text))), None)


@contextmanager
def told_by_row(cfg: DictConfig) -> Iterator[None]:
    """What goes wrong at a prompt meanwhile is told with the file and row of it."""
    try:
        yield
    except AtPrompt as error:
        place = next((found for key in ("risk", "others") if (found := file_and_row(cfg.get(key), error.prompt))), None)
        if place:
            error.args = (f"{error} (the prompt is from {place})",)
        raise
