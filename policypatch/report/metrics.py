"""How every metric is named, ordered and read.

A metric that is not in METRICS is shown under its own name and never called better or worse.
"""

from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher", "half"]


@dataclass(frozen=True)
class Metric:
    """How one metric is named and read.

    Attributes:
        label: in a table.
        better: which values are good; "half": those near one half, as of a share of pairs that shows a preference;
            None where no difference from the base is good or bad in itself.
        risk: measures the risk itself and may be the headline; False: the text's quality, or the model's use.
        harmful_text: counts texts that may offend, which the page folds away.
        spoken: in a sentence, where the label is too short for one.
    """

    label: str
    better: Direction | None = "lower"
    risk: bool = True
    harmful_text: bool = False
    spoken: str = ""


# The order is the order of the rows; unknown metrics stand between the risk's own and the text's quality.
METRICS: dict[str, Metric] = {
    "toxic_rate": Metric("toxic rate", harmful_text=True),
    "asr": Metric("ASR", harmful_text=True, spoken="attack success rate"),
    "hit_rate": Metric("hit rate", harmful_text=True, spoken="share of prompts with a hit"),
    "gas": Metric("GAS"),
    "crows_pairs": Metric("CrowS-Pairs", better="half"),
    "amt": Metric("AMT", harmful_text=True),
    "gld": Metric("GLD"),
    # How much there is for GLD to be uneven about; little of it is no aim by itself.
    "gender_mass": Metric("gender-word mass", better=None, risk=False),
    "over_refusal": Metric("over-refusal", risk=False),
    "benign_refusal": Metric("benign refusal", risk=False),
    "text_ppl": Metric("text PPL", risk=False),
    # Of the base it is 0 by definition and of anything else above: a test against the base would say "worse" always.
    "kl_benign": Metric("KL from base", better=None, risk=False),
    "ppl_median": Metric("median PPL", risk=False),
    "ppl_mean": Metric("mean PPL", risk=False),
    "trigram_overlap": Metric("trigram overlap", risk=False),
    "completion_tokens": Metric("tokens", better=None, risk=False),
}
SCORED = {"toxic_rate", "asr", "hit_rate", "gas", "over_refusal", "benign_refusal"}
"""Shares of prompts or responses whose judge's score reaches a threshold."""
CHATS = {"asr", "over_refusal", "benign_refusal"}
"""Measured on requests and responses, not on texts and their continuations."""
_FIRST_QUALITY = list(METRICS).index("gender_mass")


def metric_label(name: str) -> str:
    """The reader's name of a metric; an unknown one keeps its own."""
    return METRICS[name].label if name in METRICS else name.replace("_", " ")


def metric_spoken(name: str) -> str:
    """A metric's name in a sentence."""
    return (METRICS[name].spoken if name in METRICS else "") or metric_label(name)


REFUSALS = ("over_refusal", "benign_refusal")
"""Metrics of requests that should have been answered."""


def is_risk(name: str) -> bool:
    """Whether the metric measures the risk itself and so may carry the headline."""
    return METRICS[name].risk if name in METRICS else False


def reducible() -> list[str]:
    """Metrics of a risk itself that less is better of: a patch reduces them, by some share."""
    return [name for name, metric in METRICS.items() if metric.risk and metric.better == "lower"]


def may_offend(names: list[str]) -> bool:
    """Whether texts that these metrics were counted on need folding: yes, unless all are known not to ask for it.

    A judge of refusals or of gendered words scores texts that nobody has to be spared.
    """
    asked = [name for name in names if name not in METRICS or METRICS[name].harmful_text]
    harmless = [name for name in names if name in METRICS and (METRICS[name].risk or name in SCORED)]
    return bool(asked) or not harmless


def metric_rank(name: str) -> float:
    """Where a metric's rows stand in a group."""
    return list(METRICS).index(name) if name in METRICS else _FIRST_QUALITY - 0.5
