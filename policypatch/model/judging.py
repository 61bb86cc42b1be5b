"""Asking a judge about completions: one that fails on a text leaves that text without a score, and the run goes on."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from policypatch import ranks
from policypatch.errors import AtPrompt, PolicyPatchError
from policypatch.files.arrays import rows_array

log = logging.getLogger(__name__)

AT_ONCE = 192  # texts, of which judges may make batches of their own
OWN_COUNT = re.compile(r"\btext (\d+)\b")  # how a judge says which of the texts it was asked about

MOST_FAILED = 0.05
"""Share of the texts that a judge may fail on; one that fails on more is broken, and its figures would be as well."""


class CompletionJudge(Protocol):
    """The part of a judge that scoring completions needs (`policypatch.evaluate.judges.Judge` is one)."""

    name: str
    fingerprint: str

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
        """(N,) score of each text in [0, 1], as an answer to its prompt where the judge reads that."""
        ...


def judged(judge: CompletionJudge, texts: Sequence[str], prompts: Sequence[str], k: int) -> np.ndarray:
    """(N,) scores of all texts, which the judge is asked about at once; as `judged_in_batches` otherwise."""
    [scores] = judged_in_batches(judge, texts, prompts, k, [range(len(texts))], len(texts))
    return scores


def judgements(
    judge: CompletionJudge, texts: Sequence[Sequence[str]], prompts: Sequence[str], about: Mapping[str, Any]
) -> np.ndarray:
    """(prompts, k) the judge's scores of k texts for each prompt, kept in the cache; NaN where it failed on a text.

    Args:
        judge: who is asked.
        texts: texts[i][s] is judged as an answer to prompt i.
        prompts: the prompts.
        about: what the texts are, for the cache.
    """
    k = len(texts[0]) if texts else 1
    of = k * len(ranks.share(len(texts)))

    def make(batches: Sequence[range]) -> Iterator[np.ndarray]:
        flat = [text for row in texts for text in row]
        answered = [prompt for prompt in prompts for _ in range(k)]
        numbers = [range(rows.start * k, rows.stop * k) for rows in batches]
        for scores in judged_in_batches(judge, flat, answered, k, numbers, of):
            yield scores.reshape(-1, k)

    # One with failures is not final: where they turn out to be too many, the judge may have been mended meanwhile.
    return rows_array(
        "judgements",
        {**about, "judge": judge.fingerprint},
        len(texts),
        make,
        f"judging by {judge.name}",
        max(1, AT_ONCE // k),
        final=lambda scores: not np.isnan(scores).any(),
    )


def judged_in_batches(
    judge: CompletionJudge, texts: Sequence[str], prompts: Sequence[str], k: int, batches: Sequence[range], of: int
) -> Iterator[np.ndarray]:
    """Scores in [0, 1] of one batch after the other; NaN for a text that the judge raised an exception on.

    Which text it was is found by halving what it was asked about, so N texts of which one fails cost about 2 N.

    Args:
        judge: who is asked; may be a user's own.
        texts: (N,) what is judged, the k completions of a prompt next to each other.
        prompts: (N,) what each text answers.
        k: completions a prompt, for the words of an error.
        batches: numbers of the texts that it is asked about at once.
        of: texts in the end, those of earlier attempts counted in: what `MOST_FAILED` is a share of.

    Raises:
        PolicyPatchError: the judge raised one itself (which says what to do), gave another number of scores or one
            that is not in [0, 1], or failed on the only text, or on more than one and more than `MOST_FAILED` of all.
    """
    failed: list[int] = []
    first: Exception | None = None
    most = max(int(MOST_FAILED * of), min(1, of - 1))
    for batch in batches:
        scores = np.full(len(batch), np.nan)
        asked = [batch] if batch else []
        while asked:
            rows = asked.pop()
            part = slice(rows.start, rows.stop)
            try:
                given = judge.score(texts[part], prompts[part])
            except PolicyPatchError as error:
                at = OWN_COUNT.search(str(error))
                if at is None or not 1 <= int(at[1]) <= len(rows):
                    raise
                number = rows.start + int(at[1]) - 1  # of all texts, where the judge counts those that it was asked
                told = OWN_COUNT.sub(_place(number, k), str(error), count=1)
                raise AtPrompt(told, prompts[number]) from error
            except Exception as error:  # whatever a user's judge, or a library below it, raises
                first = first or error
                if len(rows) > 1:
                    middle = len(rows) // 2
                    asked += [rows[middle:], rows[:middle]]
                    continue
                failed.append(rows.start)
                if len(failed) > most:
                    raise AtPrompt(
                        f"judge {judge.name}: failed on {len(failed)} of {of} texts, which is too many: mend "
                        f"it or do without; the first is {_place(failed[0], k)} ({type(first).__name__}: {first})",
                        prompts[failed[0]],
                    ) from first
                continue
            given = checked_scores(judge, given, prompts[part], k, rows.start)
            scores[rows.start - batch.start : rows.stop - batch.start] = given
        yield scores
    if failed:
        log.warning(
            "judge %s failed on %d of %d texts, which count nowhere; the first is %s (%s: %s)",
            *(judge.name, len(failed), of, _place(failed[0], k), type(first).__name__, first),
        )


def checked_scores(
    judge: CompletionJudge, given: Any, prompts: Sequence[str], k: int = 1, start: int = 0
) -> np.ndarray:
    """(texts,) scores, which a judge of the user's own may not have checked: a NaN would turn up much later.

    Args:
        judge: who gave them.
        given: what it gave.
        prompts: (texts,) of the texts that it was asked about.
        k: completions a prompt.
        start: number of the first text, from 0.

    Raises:
        PolicyPatchError: another number of scores, or one that is not in [0, 1] by more than a rounding error.
    """
    scores = np.asarray(given, dtype=np.float64)
    if scores.shape != (len(prompts),):
        raise PolicyPatchError(
            f"judge {judge.name}: returned scores of shape {scores.shape} for {len(prompts)} texts: give one for each"
        )
    wrong = np.flatnonzero(~((scores >= -1e-6) & (scores <= 1 + 1e-6)))  # written so that NaN is wrong too
    if len(wrong):
        number = int(wrong[0])
        raise AtPrompt(
            f"judge {judge.name}: {_place(start + number, k)} scored {scores[number]}, which is not in [0, 1]",
            prompts[number],
        )
    return np.clip(scores, 0.0, 1.0)


def _place(number: int, k: int) -> str:
    prompt, sample = divmod(number, k)
    return f"completion {sample + 1} of prompt {prompt + 1}" if k > 1 else f"text {prompt + 1}"
