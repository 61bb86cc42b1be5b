"""Judge from any sequence classifier of transformers, from the hub or a local folder.

What an online run would use: ``unitary/toxic-bert`` (label ``toxic``),
``s-nlp/roberta_toxicity_classifier`` (label ``toxic``), or a lab's own.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges.base import BaseJudge
from policypatch.files.cache import content_key
from policypatch.files.sources import Source, fetch, identity

Activation = Literal["auto", "sigmoid", "softmax"]


class HfClassifierJudge(BaseJudge):
    """Probability that a classifier gives to one label.

    Args:
        source: ``{hub: id, revision: main}`` or a local folder (see `policypatch.files.sources`); weights are
            read from safetensors only and the repository's own code never runs. Pin a commit as revision for
            figures that are published.
        label: the toxic label's name as in the model's config (``id2label``), or its index as text.
        name: how the judge calls itself in errors and logs.
        batch_size: texts for each forward pass.
        device: where it runs, e.g. ``cpu`` or ``cuda:0``.
        activation: ``sigmoid`` for multi-label, ``softmax`` for exclusive labels; ``auto`` takes sigmoid
            if the config says ``multi_label_classification`` or there is one label, softmax otherwise.
        max_length: tokens kept of each text; never more than the tokenizer or the model's positions allow.

    Raises:
        PolicyPatchError: the model cannot be fetched or loaded as asked, or has no such label.
    """

    def __init__(
        self,
        source: Source,
        label: str,
        name: str,
        batch_size: int = 32,
        device: str = "cpu",
        activation: Activation = "auto",
        max_length: int = 512,
    ) -> None:
        super().__init__(name, batch_size)
        # Imported here: transformers costs seconds, and the other judges do without it.
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = fetch(source, f"judge {name}")
        if not folder.is_dir():
            raise PolicyPatchError(f"judge {name}: a classifier is a folder, and {folder} is a file")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_pretrained(
                folder,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,  # a score must not depend on the dtype that the weights came in
            )
        except (OSError, ValueError) as error:
            raise PolicyPatchError(f"judge {name}: cannot load the classifier {folder}: {error}") from error
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device
        self._column = _label_index(model.config, label, name)
        self._sigmoid = _uses_sigmoid(model.config, activation, name)
        limits = (max_length, self._tokenizer.model_max_length, _positions(model.config))
        self._max_length = min(limit for limit in limits if limit is not None)
        self.fingerprint = "hf_classifier:" + content_key(
            source=identity(source, f"judge {name}"),
            label=self._column,
            sigmoid=self._sigmoid,
            max_length=self._max_length,
        )

    @torch.inference_mode()
    def _score_batch(self, texts: list[str]) -> np.ndarray:
        encoded = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self._device)
        logits = self._model(**encoded).logits.float()  # (B, labels)
        probabilities = logits.sigmoid() if self._sigmoid else logits.softmax(-1)
        return probabilities[:, self._column].cpu().numpy()


def _label_index(config: Any, label: str, name: str) -> int:
    by_name = {str(text).lower(): int(number) for number, text in config.id2label.items()}
    if label.lower() in by_name:
        return by_name[label.lower()]
    if label.isdecimal() and int(label) < config.num_labels:
        return int(label)
    raise PolicyPatchError(f"judge {name}: the classifier has no label {label!r}; it has {', '.join(sorted(by_name))}")


def _uses_sigmoid(config: Any, activation: str, name: str) -> bool:
    if activation == "auto":
        return config.problem_type == "multi_label_classification" or config.num_labels == 1
    if activation not in ("sigmoid", "softmax"):
        raise PolicyPatchError(f"judge {name}: activation is auto, sigmoid or softmax, not {activation!r}")
    if activation == "softmax" and config.num_labels == 1:
        raise PolicyPatchError(f"judge {name}: softmax over one label is always 1; use sigmoid")
    return activation == "sigmoid"


def _positions(config: Any) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    # RoBERTa and its kin start counting after the padding id, so two positions are never usable.
    return int(positions) - 2 if "roberta" in config.model_type else int(positions)
