"""The model card: the manifest in words."""

from __future__ import annotations

from jinja2 import Environment, StrictUndefined

from policypatch.patch.manifest import Manifest

_TEMPLATE = """\
# {{ m.name }} {{ m.version }}

A safety patch of {{ m.length }} vectors (width {{ m.width }}, {{ "{:,}".format(m.length * m.width) }} numbers) for
**{{ m.base.id }}** ({{ m.base.revision }}). It addresses: {{ m.risks | join(", ") }}. The base's weights are not
touched: the vectors stand before the first token, at positions 0 to {{ m.length - 1 }}.

## Measured

{% if m.scorecard %}
| arm | split | metric | judge | value | 95 % interval | prompts |
|---|---|---|---|---|---|---|
{% for r in m.scorecard -%}
| {{ r.arm }} | {{ r.split }} | {{ r.metric }} | {{ r.judge or "" }}{{ " (filtered the training pairs)" if r.filter }} |
{#- #} {{ figure(r.value) }} | {{ figure(r.low) }} to {{ figure(r.high) }} | {{ r.n }} |
{% endfor %}
{%- else %}
Nothing was measured for this patch.
{% endif %}

## What it does not cover

Risks, languages, prompt formats and decoding settings other than those above were not measured. The judges are
classifiers with errors of their own; a figure by the judge that filtered the training pairs flatters the patch.

## How to apply

```python
import torch
from policypatch.patch.artifact import load
vectors = load("this/folder").vectors                     # checks digest and shape
tokens = model.get_input_embeddings()(input_ids)          # (1, T, {{ m.width }})
embeds = torch.cat([vectors[None].to(tokens.dtype), tokens], 1)
model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]))
```

Base fingerprint (embedding matrix): `{{ m.base.embedding }}`. Vectors: `{{ m.sha256 }}`. Made {{ m.created }} with
policypatch {{ m.packages.get("policypatch", "") }}.
"""


def model_card(manifest: Manifest) -> str:
    """README.md of the artifact."""
    # Markdown, not HTML, and every value is this run's own: nothing to escape for.
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    return environment.from_string(_TEMPLATE).render(m=manifest, figure="{:.3g}".format)
