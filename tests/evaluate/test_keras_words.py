"""The inert reader of Keras' tokenizer, and its two functions."""

import os
import pickle
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges.keras_words import KerasWords

FILTERS = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n'


@pytest.fixture
def write_tokenizer(tmp_path, monkeypatch):
    """Pickle a tokenizer that looks like Keras' own, without Keras."""
    module = types.ModuleType("keras.src.legacy.preprocessing.text")

    class Tokenizer:
        pass

    Tokenizer.__module__, Tokenizer.__qualname__ = module.__name__, "Tokenizer"
    module.Tokenizer = Tokenizer
    parts = module.__name__.split(".")
    for length in range(1, len(parts)):  # pickle imports the parents as well
        parent = ".".join(parts[:length])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def write(words, **changes):
        tokenizer = Tokenizer()
        tokenizer.__dict__ = {
            "word_counts": OrderedDict.fromkeys(words, 1),
            "word_docs": defaultdict(int, dict.fromkeys(words, 1)),
            "filters": FILTERS,
            "split": " ",
            "lower": True,
            "num_words": None,
            "char_level": False,
            "oov_token": None,
            "word_index": {word: number for number, word in enumerate(words, start=1)},
            "analyzer": None,
        } | changes
        path = tmp_path / "tokenizer.pickle"
        path.write_bytes(pickle.dumps(tokenizer))
        return path

    return write


def test_words_become_ids_padded_in_front(write_tokenizer):
    words = KerasWords.read(write_tokenizer(["the", "cat", "sat"]))
    np.testing.assert_array_equal(
        words.encode(["The CAT, sat!\tthe", "", "dog"], 6), [[0, 0, 1, 2, 3, 1], [0] * 6, [0] * 6]
    )


def test_long_texts_keep_their_end(write_tokenizer):
    words = KerasWords.read(write_tokenizer(["a", "b", "c"]))
    np.testing.assert_array_equal(words.encode(["a b c a b"], 3), [[3, 1, 2]])


def test_num_words_drops_rare_words_as_keras_does(write_tokenizer):
    """num_words=3 keeps ids 1 and 2: Keras keeps i < num_words."""
    words = KerasWords.read(write_tokenizer(["a", "b", "c"], num_words=3))
    np.testing.assert_array_equal(words.encode(["a c b"], 3), [[0, 1, 2]])


def test_unknown_words_become_the_oov_token(write_tokenizer):
    words = KerasWords.read(write_tokenizer(["<oov>", "a", "b"], oov_token="<oov>", num_words=3))
    np.testing.assert_array_equal(words.encode(["a b x"], 4), [[0, 2, 1, 1]])


def test_only_listed_characters_separate_words(write_tokenizer):
    """Keras splits on its own separator, so a no-break space or an apostrophe stays inside a word."""
    words = KerasWords.read(write_tokenizer(["don't", "a\u00a0b"]))
    np.testing.assert_array_equal(words.encode(["don't a\u00a0b"], 2), [[1, 2]])


class Payload:
    def __init__(self, function, argument):
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, r"\w+\.system"), (eval, "builtins.eval"), (getattr, "builtins.getattr")],
)
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, function, named):
    mark = tmp_path / "ran"
    path = tmp_path / "tokenizer.pickle"
    path.write_bytes(pickle.dumps(Payload(function, f"touch {mark}")))
    with pytest.raises(PolicyPatchError, match=named):
        KerasWords.read(path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"word_index": {}}), pickle.dumps(3)])
def test_anything_else_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.pickle"
    path.write_bytes(content)
    with pytest.raises(PolicyPatchError, match=r"tokenizer\.pickle"):
        KerasWords.read(path)


def test_character_tokenizers_are_refused(write_tokenizer):
    with pytest.raises(PolicyPatchError, match="word-level"):
        KerasWords.read(write_tokenizer(["a"], char_level=True))
