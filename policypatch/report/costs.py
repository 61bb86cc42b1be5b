"""What an arm costs, in words: the page's table and the sentence of the terminal."""

from collections.abc import Iterable

from policypatch.report.scorecard import Group, Row, costs_of, readable
from policypatch.report.view import duration
from policypatch.report.wording import number

LABELS = {
    "trainable_parameters": "trainable parameters",
    "parameter_share": "share of the base's",
    "artifact_bytes": "size of the file",
    "train_seconds": "both stages took",
    "device_hours": "device-hours",
    "peak_memory_bytes": "most memory held",
    "first_token_ratio": "time to the first token",
    "per_token_ratio": "time for each further token",
    "first_token_ratio_merged": "merged: time to the first token",
    "per_token_ratio_merged": "merged: for each further token",
}


def cost_label(metric: str) -> str:
    """A cost's name for a reader."""
    return LABELS.get(metric, readable(metric))


def cost_text(row: Row) -> str:
    """A cost with its unit."""
    metric, value = str(row["metric"]), float(row["value"])
    if metric == "parameter_share":
        return f"{100 * value:.2g} %"
    if metric == "trainable_parameters":
        return f"{value:,.0f}"
    if metric.endswith("_bytes"):
        return size(value)
    if metric.endswith("_seconds"):
        return duration(value)
    if metric.endswith("_hours"):
        return f"{number(value)} h"
    return f"{value:.3f} ×"


def size(count: float) -> str:
    """Bytes in the unit that leaves three digits: 115 kB, 20.1 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


def load_text(group: Group) -> str:
    """A group of costs for a reader."""
    return load_name(group.split)


def load_name(split: str) -> str:
    """What was answered: "32x16" is 16 prompts of 32 tokens at once."""
    prompt, _, batch = split.partition("x")
    if not (prompt.isdecimal() and batch.isdecimal()):
        return readable(split)
    return f"{batch} prompt{'s' * (batch != '1')} of {prompt} tokens"


def cost_sentence(rows: Iterable[Row]) -> str | None:
    """The size, the training and the first load of the scorecard's last arm; None where costs were not measured."""
    groups = costs_of(rows)
    if not groups:
        return None
    arm = list(dict.fromkeys(arm for group in groups for line in group.lines for arm in line.cells))[-1]
    lines = {(group.split, line.metric): line.cells for group in groups for line in group.lines}
    said = {place: cost_text(cells[arm]) for place, cells in lines.items() if arm in cells}
    training = {metric: text for (split, metric), text in said.items() if split == "training"}
    parts = []
    if training.get("trainable_parameters", "0") != "0":
        share = f"{training['parameter_share']} of the base's"
        parts.append(f"{training['trainable_parameters']} trainable parameters ({share}), {training['artifact_bytes']}")
    if "train_seconds" in training:
        parts.append(f"trained in {training['train_seconds']} within {training['peak_memory_bytes']}")
    if loads := [group.split for group in groups if group.split != "training"]:
        first, further = (said[loads[0], metric] for metric in ("first_token_ratio", "per_token_ratio"))
        prompt, _, batch = loads[0].partition("x")
        answer = f"({prompt} tokens, batch {batch})"
        parts.append(f"{first} the base's time to the first token, {further} for each further one {answer}")
    return f"{arm}: {'; '.join(parts)}." if parts else None
