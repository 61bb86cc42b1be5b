"""Risk `custom`: a policy of the user's own, from a file of prompts and one judge.

    python run.py risk=custom risk.prompts=prompts.jsonl 'risk.judge={pattern: "\\bAcme\\b"}'

A row of the file has a `prompt`, and `split: evaluation` where it is to be measured on; in a file without any such
row every fifth prompt is that is not said to be for training (`split: train`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from policypatch.data.prompts import normalise, read_rows
from policypatch.errors import PolicyPatchError
from policypatch.evaluate.judges import HfClassifierJudge, Judge, PatternJudge
from policypatch.evaluate.probes import Probe, SampledProbe
from policypatch.files.sources import Source
from policypatch.model.form import CHAT, PLAIN, Form

EVERY = 5  # one prompt in so many is measured on where the file does not say which


class Custom:
    """Hit rate: share of prompts with at least one completion that the judge scores at or above the threshold.

    Args:
        prompts: a JSONL file with `prompt` and maybe `split`, or a text file with one prompt a line.
        judge: `{pattern: REGEX}`, `{words: [...]}`, `{hf: ID OR FOLDER, label: LABEL}`, or any judge with a `_target_`.
        name: how the risk is called in names, manifests and scorecards.
        chat: whether prompts are requests in the base's chat template.
        threshold: a completion that scores at or above it is a hit.
        extra: more judges, by name, which do not choose the pairs.
        filter: what judges that choose pairs are called: `policy`, the one above.

    Raises:
        PolicyPatchError: a judge that none of these forms describe.
    """

    compliance = False
    shares: tuple[str, ...] = ()
    benign_prompts: tuple[str, ...] = ()
    benign_sets: tuple[list[str], ...] = ()
    benign_texts: tuple[str, ...] = ()
    swaps: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        prompts: Source,
        judge: Mapping[str, Any] | str | Judge,
        name: str = "custom",
        chat: bool = False,
        threshold: float = 0.5,
        extra: Mapping[str, Judge] | None = None,
        filter: Sequence[str] = ("policy",),
    ):
        self.name, self.prompts, self.threshold = name, prompts, threshold
        self.form: Form = CHAT if chat else PLAIN
        self.judges: dict[str, Judge] = {"policy": made_judge(judge), **(extra or {})}
        self.filter = tuple(filter)

    @cached_property
    def _split(self) -> tuple[list[str], list[str]]:
        """Prompts to train on and to measure on."""
        rows = read_rows(self.prompts, "risk.prompts", "prompt")
        for number, (_, row) in enumerate(rows, 1):
            if row.get("split") not in (None, "", "train", "evaluation"):  # a table has a cell in every row
                raise PolicyPatchError(
                    f"risk.prompts ({self.prompts}), prompt {number}: split is {row['split']!r}: write train or "
                    "evaluation, or leave it out"
                )
        trained = {normalise(text) for text, row in rows if row.get("split") == "train"}
        marked = [n for n, (_, row) in enumerate(rows) if row.get("split") == "evaluation"]
        free = [n for n, (text, row) in enumerate(rows) if not row.get("split") and normalise(text) not in trained]
        held = set(marked or free[::EVERY])
        measured = [text for n, (text, _) in enumerate(rows) if n in held]
        training = [text for n, (text, _) in enumerate(rows) if n not in held]
        known = {normalise(text) for text in measured}
        training = [text for text in training if normalise(text) not in known]
        if not training or not measured:
            raise PolicyPatchError(
                f"risk.prompts ({self.prompts}) has nothing to {'measure' if training else 'train'} on: give at least "
                "two different prompts, some of them with split: evaluation, or none"
            )
        return list(dict.fromkeys(training)), list(dict.fromkeys(measured))

    @property
    def training_prompts(self) -> list[str]:
        """What pairs are made from."""
        return self._split[0]

    def probes(self, limit: int | None) -> list[Probe]:
        """The one there is."""
        prompts = self._split[1][:limit]
        return [
            SampledProbe(
                self.name, "evaluation", prompts, self.judges, ("hit_rate",), self.form, threshold=self.threshold
            )
        ]


def made_judge(spec: Mapping[str, Any] | str | Judge) -> Judge:
    """The judge that a user's short form describes."""
    if isinstance(spec, DictConfig):
        spec = OmegaConf.to_container(spec, resolve=True)  # type: ignore[assignment]
    if isinstance(spec, str):
        spec = {"pattern": spec}
    if not isinstance(spec, Mapping):
        return spec
    if "_target_" in spec:
        return instantiate(spec)
    if set(spec) == {"pattern"}:
        return PatternJudge([spec["pattern"]], "policy")
    if set(spec) == {"words"}:
        return PatternJudge(words=spec["words"], name="policy")
    if set(spec) == {"hf", "label"}:
        return HfClassifierJudge(_folder_or_hub(spec["hf"]), spec["label"], "policy")
    raise PolicyPatchError(
        f"risk.judge is {dict(spec)!r}: give {{pattern: REGEX}}, {{words: [...]}}, {{hf: ID, label: LABEL}} or a judge "
        "with a _target_"
    )


def _folder_or_hub(source: Any) -> Source:
    """A plain string is a folder where there is one, and a repository of the hub otherwise."""
    return {"hub": source} if isinstance(source, str) and not Path(source).expanduser().exists() else source
