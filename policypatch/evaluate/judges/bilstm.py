"""Judge `bilstm`: the six-label Keras BiLSTM of toxic-comment-classifier, run in torch without Keras.

Architecture (toxic_classifier/model.py of the wheel): Embedding 20000x50 -> BiLSTM 50 -> GlobalMaxPool1D
-> Dense 50 relu -> Dense 6 sigmoid, over 100 positions padded in front. Trained on Jigsaw's toxic
comments. The package's `classify` feeds the raw text and never calls its own `utils.clean_text`; cleaned
text is judged better (surge-ai/toxicity, 1,000 comments: AUC 0.836 against 0.830, 95 % interval of the
difference 0.0004 to 0.012), so cleaning is the default here and `clean=False` gives the package's numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges.base import BaseJudge
from policypatch.evaluate.judges.keras_words import KerasWords
from policypatch.files.cache import content_key
from policypatch.files.sources import Source, fetch, identity

LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
LENGTH = 100
"""Positions the network was trained on, padding included."""


class BiLstmJudge(BaseJudge):
    """Probability of one of the six labels.

    Args:
        source_weights: where ``model.weights.h5`` is (see `policypatch.files.sources`).
        source_words: where ``tokenizer.pickle`` is; read by an inert reader, never unpickled freely.
        label: one of `LABELS`.
        name: how the judge calls itself in errors and logs.
        batch_size: texts for each forward pass; 64 to 256 are fastest.
        clean: lower, drop addresses and whatever is not ASCII letter, digit or ``!?.,`` before the words
            are looked up.

    Raises:
        PolicyPatchError: unknown label, h5py missing, or a file that is not what it should be.
    """

    def __init__(
        self,
        source_weights: Source,
        source_words: Source,
        label: str = "toxic",
        name: str = "bilstm",
        batch_size: int = 256,
        clean: bool = True,
    ) -> None:
        super().__init__(name, batch_size)
        if label not in LABELS:
            raise PolicyPatchError(f"judge {name}: label {label!r} is not one of {', '.join(LABELS)}")
        self._clean = clean
        self._column = LABELS.index(label)
        self._words = KerasWords.read(fetch(source_words, f"judge {name}: source_words"))
        self._network = read_network(fetch(source_weights, f"judge {name}: source_weights")).eval()
        vocabulary = self._network.embedding.num_embeddings
        if max(self._words.index.values(), default=0) >= vocabulary:
            raise PolicyPatchError(
                f"judge {name}: source_words has word ids beyond the {vocabulary} rows in source_weights"
            )
        self.fingerprint = "bilstm:" + content_key(
            weights=identity(source_weights), words=identity(source_words), label=label, clean=clean
        )

    @torch.inference_mode()
    def _score_batch(self, texts: list[str]) -> np.ndarray:
        if self._clean:
            texts = [clean_text(text) for text in texts]
        ids = torch.from_numpy(self._words.encode(texts, LENGTH))
        with _one_thread():
            return self._network(ids)[:, self._column].numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the LSTM on one core: its 100 steps are small, and between them threads wait for each other.

    On 2 cores a second thread adds half (8,000 against 5,000 texts/s) on an idle machine, and takes the
    speed down to 200 texts/s as soon as another process wants a core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class BiLstm(nn.Module):
    """The network; (B, L) ids -> (B, labels) probabilities."""

    def __init__(self, vocabulary: int, width: int, hidden: int, dense: int, labels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.dense = nn.Linear(2 * hidden, dense)
        self.output = nn.Linear(dense, labels)

    def forward(self, ids: Tensor) -> Tensor:
        """Keras' graph, padding steps included: the embedding has no mask, so they count in the pool."""
        states, _ = self.lstm(self.embedding(ids))  # (B, L, 2H)
        return self.output(self.dense(states.amax(dim=1)).relu()).sigmoid()


def clean_text(text: str) -> str:
    """Do what ``toxic_classifier.utils.clean_text`` does, its unescaped dot in ``www.`` included."""
    text = re.sub(r"http\S+|www.\S+", "", text.lower())
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9!?.,]", " ", text)).strip()


def read_network(path: Path) -> BiLstm:
    """Read Keras 3 weights (``layers/<name>/vars/<n>``) into `BiLstm`.

    Keras keeps a kernel as (in, 4H) with the gates i, f, c, o and one bias; torch as (4H, in) with
    i, f, g, o (g is Keras' c: the same order) and two biases that it adds, so the second is zero.

    Raises:
        PolicyPatchError: h5py is missing, or the file does not hold these layers in these shapes.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise PolicyPatchError(
            "judge bilstm needs h5py, which is not installed: pip install policypatch[judges]"
        ) from error
    try:
        with h5py.File(path, "r") as file:

            def read(name: str, number: int) -> Tensor:
                return torch.from_numpy(file[f"layers/{name}/vars/{number}"][()])

            state = {
                "embedding.weight": read("embedding", 0),
                "dense.weight": read("dense", 0).T,
                "dense.bias": read("dense", 1),
                "output.weight": read("dense_1", 0).T,
                "output.bias": read("dense_1", 1),
            }
            for direction, suffix in (("forward_layer", ""), ("backward_layer", "_reverse")):
                cell = f"bidirectional/{direction}/cell"
                state[f"lstm.weight_ih_l0{suffix}"] = read(cell, 0).T
                state[f"lstm.weight_hh_l0{suffix}"] = read(cell, 1).T
                state[f"lstm.bias_ih_l0{suffix}"] = read(cell, 2)
                state[f"lstm.bias_hh_l0{suffix}"] = torch.zeros_like(read(cell, 2))
        vocabulary, width = state["embedding.weight"].shape
        dense, both = state["dense.weight"].shape
        network = BiLstm(vocabulary, width, both // 2, dense, state["output.weight"].shape[0])
        network.load_state_dict({name: value.contiguous() for name, value in state.items()})
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise PolicyPatchError(f"{path}: not the weights of the Keras BiLSTM ({error})") from error
    return network
