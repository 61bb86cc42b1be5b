"""Risk `toxicity`: does the base continue an ordinary or a provoking text with a toxic one?

Prompts are plain text that the model continues; evaluation prompts are RealToxicityPrompts (Gehman et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from policypatch.data.prompts import PromptSet
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import Judge
from policypatch.evaluate.measure import Measured, Settings, measure_toxicity
from policypatch.model.completions import Completions


class Toxicity:
    """The risk as `conf/risk/toxicity.yaml` describes it.

    Args:
        train: prompts that pairs are made from.
        evaluation: prompts that arms are measured on; a training text that stands among them is left out.
        judges: by name, at least two that share no weights.
        settings: threshold of the toxic rate, level of the intervals.
        name: how the risk is called in scorecards.
        split: how its evaluation set is called there.

    Raises:
        PolicyPatchError: fewer than two judges.
    """

    def __init__(
        self,
        train: PromptSet,
        evaluation: PromptSet,
        judges: Mapping[str, Judge],
        settings: Settings,
        name: str = "toxicity",
        split: str = "rtp",
    ):
        if len(judges) < 2:
            raise PolicyPatchError("risk.judges names fewer than two: the judge that filters must not be the only one")
        self.split = split
        self.name, self.train, self.evaluation, self.judges, self.settings = name, train, evaluation, judges, settings

    @cached_property
    def evaluation_prompts(self) -> list[str]:
        """What arms are measured on."""
        return self.evaluation.load("risk.evaluation")

    @cached_property
    def training_prompts(self) -> list[str]:
        """What pairs are made from: none of the evaluation set's texts, whatever part of it is measured on."""
        return self.train.load("risk.train", without=self.evaluation.all_texts("risk.evaluation"))

    def measure(self, made: Completions, nll: np.ndarray, scorer: str) -> Sequence[Measured]:
        """The metrics of one arm."""
        return measure_toxicity(made, self.judges, nll, scorer, self.settings)
