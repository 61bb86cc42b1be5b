"""Risk `gender_bias`: does the base give people a gender that the text does not?

Prompts are beginnings of sentences about someone of whom the profession is told and the gender is not. GAS counts
continuations with a gender word, GLD compares the next word's mass on male and on female words (arXiv 2402.11190), and
CrowS-Pairs asks which of two sentences the model finds likelier (Nangia et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from policypatch.data.prompts import PromptSet
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.probes import CrowsPairsProbe, NextWordProbe, Probe, SampledProbe
from policypatch.risks.risk import Risk


class GenderBias(Risk):
    """See `Risk` for what is not said here.

    Args:
        words: word lists for GLD, `male` and `female`.
        crows: the sentences of CrowS-Pairs in the order of their rows, `more` and `less` stereotypical; None leaves
            them out.
        shares: judges and metrics that count words which the filter counts, or which balanced rows exchange.
    """

    def __init__(
        self,
        words: Mapping[str, PromptSet],
        crows: Mapping[str, PromptSet] | None,
        shares: Sequence[str] = (),
        **options: Any,
    ):
        super().__init__(**options)
        self.words, self.crows, self.shares = dict(words), dict(crows or {}), tuple(shares)

    @cached_property
    def swaps(self) -> dict[str, str]:
        """Each word of the lists and its counterpart.

        Without "her", which stands for "his" and "him" alike; "his" is taken for the one before a noun.
        """
        male, female = self._lists()
        if len(male) != len(female):
            raise PolicyPatchError(
                f"risk.words has {len(male)} male and {len(female)} female words: pair them line by line"
            )
        both = [*zip(male, female, strict=True), *zip(female, male, strict=True)]
        return {one: other for one, other in both if one != "her"} | ({"his": "her"} if "his" in male else {})

    def _lists(self) -> tuple[list[str], list[str]]:
        male, female = (self.words[key].load(f"risk.words.{key}") for key in ("male", "female"))
        return male, female

    def probes(self, limit: int | None) -> list[Probe]:
        """GAS and GLD on each set, then CrowS-Pairs, the whole of it, unless it is left out."""
        male, female = self._lists()
        found: list[Probe] = []
        for split in self.evaluation:
            prompts = self.load(split, limit)
            found.append(SampledProbe(self.name, split, prompts, self.judges, ("gas",), threshold=self.threshold))
            found.append(NextWordProbe(split, prompts, male, female, self.name))
        if not self.crows:
            return found
        more, less = (self.crows[key].all_texts(f"risk.crows.{key}") for key in ("more", "less"))
        if len(more) != len(less):
            raise PolicyPatchError(
                f"risk.crows has {len(more)} more and {len(less)} less stereotypical sentences: pair them"
            )
        # All of them, whatever the limit: they are two sentences to read, and the first ones of a file are no draw.
        return [*found, CrowsPairsProbe("crows_pairs", more, less, self.name)]
