"""Judge `svm`: the linear SVM over word counts of alt-profanity-check; fast, offline, sees swear words.

AUC against people's labels (surge-ai/toxicity) and its blind spots: see `policypatch.evaluate.judge_quality`. It misses
dehumanising text without swear words and over-scores words for groups, so never use it as the only judge.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges.base import BaseJudge


class SvmJudge(BaseJudge):
    """`profanity_check.predict_prob`: Platt-scaled probability that a text is profane.

    Source: package ``alt-profanity-check`` (extra ``judges``), a LinearSVC trained on Jigsaw's toxic
    comments and Davidson et al.'s tweets. Its model ships inside the package, so its version is its digest.

    Raises:
        PolicyPatchError: the package is not installed, or scikit-learn cannot read its model.
    """

    def __init__(self, name: str = "svm", batch_size: int = 4096) -> None:
        super().__init__(name, batch_size)
        self._predict_prob = _import_predict_prob()
        self.fingerprint = (
            f"svm:alt-profanity-check=={version('alt-profanity-check')}:scikit-learn=={version('scikit-learn')}"
        )

    def _score_batch(self, texts: list[str]) -> np.ndarray:
        return np.asarray(self._predict_prob(texts))


def _import_predict_prob() -> Any:
    try:
        from profanity_check import predict_prob
    except ModuleNotFoundError as error:
        raise PolicyPatchError(
            f"judge svm needs {error.name}, which is not installed: pip install policypatch[judges]"
        ) from error
    return predict_prob
