"""How far a judge is to be believed: AUC and agreement against labels that people gave.

Measured on surge-ai/toxicity (MIT; 1,000 comments from social media, 501 toxic by people's judgement):
svm AUC 0.843 (95 % interval 0.818 to 0.868), bilstm 0.836 (0.812 to 0.861), mean of both 0.856 (0.833 to
0.880); agreement at 0.5 is 0.72 to 0.73 for each. Both miss dehumanising text without swear words and
over-score words for groups. Such a judge ranks one pair in six wrongly: compare arms by it, and do not
read its toxic rates as absolute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges.base import Judge

MEAN = "mean"
"""Name of the row for the mean of all judges' scores."""


@dataclass(frozen=True)
class Quality:
    """One judge against labels."""

    judge: str
    auc: float
    """Chance that a toxic text scores above a harmless one; ties count half."""
    low: float
    high: float
    """95 % bootstrap interval of the AUC over texts."""
    agreement: float
    """Share of texts on the same side of 0.5 as their label."""
    n: int


def auc_table(
    judges: Sequence[Judge],
    texts: Sequence[str],
    labels: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Quality]:
    """Compare judges with labels; with two judges and more, a last row for the mean of their scores.

    Args:
        judges: what to compare.
        texts: N texts.
        labels: (N,) True or 1 where a text is toxic.
        level: coverage of the AUC's interval.
        resamples: bootstrap samples, drawn within each class so that each has both.
        seed: of the bootstrap; every judge sees the same samples.

    Raises:
        PolicyPatchError: lengths differ, or one of the classes is empty (as in a set that was chosen by
            its score), where an AUC does not exist.
    """
    toxic = np.asarray(labels).astype(bool)
    if toxic.shape != (len(texts),):
        raise PolicyPatchError(f"auc_table: {len(texts)} texts but labels of shape {toxic.shape}")
    if toxic.all() or not toxic.any():
        raise PolicyPatchError(
            f"auc_table: an AUC needs toxic and harmless texts; {int(toxic.sum())} of {len(toxic)} are toxic"
        )
    scores = {judge.name: judge.score(texts) for judge in judges}
    if len(scores) != len(judges):
        raise PolicyPatchError("auc_table: two judges have the same name")
    if len(judges) > 1:
        scores[MEAN] = np.mean(list(scores.values()), axis=0)
    rows = []
    for name, values in scores.items():
        low, high = _interval(values[toxic], values[~toxic], level, resamples, seed)
        agreement = float(((values >= 0.5) == toxic).mean())
        rows.append(Quality(name, auc(values, toxic), low, high, agreement, len(toxic)))
    return rows


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve as Mann-Whitney U / (positives * negatives), ties half; both shape (N,)."""
    toxic = np.asarray(labels).astype(bool)
    ranks = rankdata(np.asarray(scores, dtype=np.float64))
    positives = int(toxic.sum())
    negatives = len(toxic) - positives
    return float((ranks[toxic].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _interval(toxic: np.ndarray, harmless: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    # With m[i, j] = 1, 1/2 or 0 as toxic i scores above, like or below harmless j, the AUC of a resample
    # is the mean of m weighted by how often each text was drawn: two matrix products for all resamples.
    wins = (np.sign(toxic[:, None] - harmless[None, :]) + 1) / 2
    draw = np.random.default_rng(seed)
    drawn_toxic = draw.multinomial(len(toxic), np.full(len(toxic), 1 / len(toxic)), resamples)
    drawn_harmless = draw.multinomial(len(harmless), np.full(len(harmless), 1 / len(harmless)), resamples)
    aucs = ((drawn_toxic @ wins) * drawn_harmless).sum(axis=1) / (len(toxic) * len(harmless))
    low, high = np.quantile(aucs, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
