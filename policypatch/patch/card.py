"""The model card: the manifest in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

from policypatch.patch.manifest import COST, Manifest

_TEMPLATE = """\
# {{ m.name }} {{ m.version }}

A safety patch of {{ m.length }} vectors (width {{ m.width }}, {{ "{:,}".format(m.length * m.width) }} numbers) for
**{{ m.base.id }}** ({{ m.base.revision }}). It addresses: {{ m.risks | join(", ") }}. The base's weights are not
touched: the vectors stand before the first token, at positions 0 to {{ m.length - 1 }}.

## Measured

{% if tables %}
{% for table in tables %}
### {{ table.heading }}

{% if table.claims %}
{% for claim in table.claims %}
- {{ claim }}
{% endfor %}

{% endif %}
| split | metric | judge | base | {{ arm }} | {{ level }} interval of {{ arm }} | prompts |
|---|---|---|---|---|---|---|
{% for line in table.lines %}
{{ line }}
{% endfor %}

{% endfor %}
{% else %}
Nothing was measured for this patch.

{% endif %}
## What it costs

{% for cost in costs %}
- {{ cost }}
{% endfor %}

## What it does not cover

Risks, languages, prompt formats and decoding settings other than those above were not measured. The judges are
classifiers with errors of their own, which no bound above has in it; a figure that had a part in
training flatters the patch. The bounds are those of one patch on prompts that it was not chosen by: where settings were
chosen by looks at these prompts, measure it on others (`policypatch audit`).

## How to apply

1. To your own transformers model, for `generate`, pipelines and chats:

   ```python
   import policypatch
   policypatch.apply(model, "this/folder", tokenizer=tokenizer)   # policypatch.remove(model) takes it away
   ```

2. Behind an OpenAI-compatible server, as the models `base` and `base+{{ m.name }}`:

   ```
   policypatch serve --model BASE --patch this/folder
   ```

3. By an engine that knows nothing of patches (vLLM, llama.cpp), as words of the base's vocabulary before a prompt:

   ```
   policypatch export this/folder --to tokens --model BASE --out model        # gguf: a file for llama.cpp
   ```

4. By PEFT, as prompt tuning:

   ```
   policypatch export this/folder --to peft --out adapter      # then PeftModel.from_pretrained(model, "adapter")
   ```

BASE is a folder, a GGUF file or a hub id of **{{ m.base.id }}**; each way but PEFT's refuses another model.

Base fingerprint (embedding matrix): `{{ m.base.embedding }}`. Vectors: `{{ m.sha256 }}`. Made {{ m.created }} with
policypatch {{ m.packages.get("policypatch", "") }}.
"""


Row = dict[str, Any]


@dataclass(frozen=True)
class _Table:
    """The figures of one risk, each line a row of a Markdown table, and what can be guaranteed from them."""

    heading: str
    claims: list[str]
    lines: list[str]


def model_card(manifest: Manifest) -> str:
    """README.md of the artifact: base and patch on the risks it addresses, then on the others and utility."""
    rows: list[Row] = manifest.scorecard
    arm = next((row["arm"] for row in reversed(rows) if row["arm"] != "base"), "base")
    level = _level(manifest)
    risks = list(dict.fromkeys(str(row["risk"]) for row in rows))
    own = [risk for risk in risks if risk in manifest.risks] or risks[:1]
    tables = [_table(f"Addressed: {_words(risk)}", rows, risk, arm, level) for risk in own]
    others = sorted((risk for risk in risks if risk not in (*own, COST)), key=lambda risk: risk == "utility")
    tables += [_table(f"Side effects: {_words(risk)}", rows, risk, arm, level) for risk in others]
    # Markdown, not HTML, and every value is this run's own: nothing to escape for.
    environment = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        m=manifest, tables=tables, arm=arm, level=level, costs=_costs(manifest, arm)
    )


def _costs(manifest: Manifest, arm: str) -> list[str]:
    """What a patch takes of a context, of bytes and of time, as far as that was measured."""
    rows = [row for row in manifest.scorecard if row["risk"] == COST and row["arm"] == arm]
    found = [f"{manifest.length} positions of the base's context, in every request"]
    for metric, said in (
        ("train_seconds", "{:.0f} seconds of training"),
        ("artifact_bytes", "{:.0f} bytes of vectors"),
    ):
        found += [said.format(row["value"]) for row in rows if row["metric"] == metric]
    for metric, said in (("first_token_ratio", "to the first token"), ("per_token_ratio", "for each further token")):
        for row in rows:
            if row["metric"] == metric:
                prompt, _, batch = str(row["split"]).partition("x")
                found.append(
                    f"{row['value']:.3g} times the base's time {said} ({row['low']:.3g} to {row['high']:.3g}; prompts "
                    f"of {prompt} tokens, {batch} at once, nothing kept from one answer to the next)"
                )
    return found


def _table(heading: str, rows: list[Row], risk: str, arm: str, level: str) -> _Table:
    cells: dict[tuple[str, str, str | None], dict[str, Row]] = {}
    for row in rows:
        if row["risk"] == risk:
            cells.setdefault((row["split"], row["metric"], row["judge"]), {})[row["arm"]] = row
    lines, claims = [], []
    for (split, metric, judge), by_arm in cells.items():
        base, ours = by_arm.get("base"), by_arm.get(arm)
        said = ours or base
        if said is None:
            continue  # measured for an arm that is not packaged
        by = f"{judge or ''}{' (had a part in training)' if said.get('filter') else ''}".strip()
        interval = "" if ours is None else f"{_figure(ours['low'])} to {_figure(ours['high'])}"
        values = [_figure(row["value"]) if row else "–" for row in (base, ours)]
        lines.append(f"| {' | '.join([_words(split), metric, by, *values, interval, str(said['n'])])} |")
        upper = None if ours is None else ours.get("upper")
        others = [arms.get(arm, {}) for key, arms in cells.items() if key[:2] == (split, metric)]
        flattered = said.get("filter") and any(not row.get("filter", True) for row in others)
        if upper is not None and not flattered:
            judged = f", judged by {by}" if by else ""
            claims.append(
                f"With {level} confidence {metric} is below {_rounded_up(upper)} on prompts such as those of "
                f"{_words(split)}{judged}."
            )
    return _Table(heading, claims, lines)


def _level(manifest: Manifest) -> str:
    """Of intervals and bounds, from the config the patch was made with."""
    settings = manifest.training.get("evaluate")
    level = settings.get("level") if isinstance(settings, dict) else None
    return f"{100 * (level if isinstance(level, int | float) else 0.95):.6g} %"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(value: float) -> str:
    return f"{value:.3g}"


def _rounded_up(value: float) -> str:
    """To three digits and never down: a bound of 0.1942 does not say "below 0.194"."""
    if value <= 0:
        return _figure(value)
    value = max(value, 1e-300)  # a unit of what is smaller would be 0
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return _figure(math.ceil(value / unit - 1e-9) * unit)
