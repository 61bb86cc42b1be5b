"""What the pages of a run and of a comparison share: how their templates are read, and that they are whole UTF-8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, filters: dict[str, Any], functions: dict[str, Any], **content: Any) -> str:
    """A page from a template of this folder; everything is escaped, and a name that is not given is an error.

    Args:
        template: its file.
        filters: what it may say behind a `|`.
        functions: what it may call.
        content: what it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    environment.globals |= functions
    html = environment.get_template(template).render(**content)
    # A model can write half a surrogate pair, for which UTF-8 has no form.
    return html.encode("utf-8", "replace").decode("utf-8")
