"""What the figures of run and comparison share: size, colours, styles of arms, and drawings as inline SVG.

Every panel is an SVG of its own, so that the page can lay them out for its width. Text stays text, the
background is transparent, and every colour is a CSS variable of the page with a fallback for a panel
that stands alone: `var(--arm-patch, #0072b2)`. The colours are those of Okabe and Ito, one for each arm,
and each arm has a dash pattern as well.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, HEIGHT = 360, 216  # user units; text is 11 of them, so that one unit is about one CSS pixel
TITLE = 24  # of them above a panel that stands alone
_RC: Any = {  # matplotlib types it as a dict of literal keys
    "svg.fonttype": "none",
    "font.size": 11,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a "$" in a name is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "path.simplify_threshold": 0.3,
}

# Matplotlib knows no CSS variables: it draws in the fallback colours, which `_svg` then replaces.
INK, MUTED, LINE = "#1b1f24", "#57606a", "#d0d7de"
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"}


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn: its CSS variable, the colour to fall back on and its dash pattern."""

    variable: str
    colour: str
    dash: tuple[float, ...] = ()

    @property
    def css(self) -> str:
        """The colour as the page writes it."""
        return f"var({self.variable}, {self.colour})"


_KNOWN_ARMS = {
    "base": ArmStyle("--arm-base", "#000000"),
    "sft": ArmStyle("--arm-sft", "#cc79a7", (5, 2)),
    "patch": ArmStyle("--arm-patch", "#0072b2"),
    "teacher": ArmStyle("--arm-teacher", "#e69f00", (2, 1.5)),
}
_OTHER_ARMS = (
    ArmStyle("--arm-other-1", "#009e73", (7, 2, 2, 2)),
    ArmStyle("--arm-other-2", "#56b4e9", (7, 2)),
    ArmStyle("--arm-other-3", "#d55e00", (3, 1)),
)


@dataclass(frozen=True)
class Panel:
    """One figure: its title, its drawing and what must be said beside it."""

    title: str
    svg: Markup
    note: str = ""


def alone(panel: Panel) -> str:
    """A panel as a file of its own, for a paper or a README: on white, under its title."""
    head, _, body = str(panel.svg).partition(">")
    head = head.replace(f'viewBox="0 0 {WIDTH} {HEIGHT}"', f'viewBox="0 -{TITLE} {WIDTH} {HEIGHT + TITLE}"')
    head = head.replace('font-family="inherit"', 'font-family="sans-serif"')
    ground = f'<rect y="-{TITLE}" width="100%" height="100%" fill="white"/>'
    title = f'<text x="8" y="-{TITLE - 16}" font-size="12" font-weight="bold" fill="{INK}">{escape(panel.title)}</text>'
    return f"{head}>{ground}{title}{body}"


def slug(title: str) -> str:
    """A title as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def arm_styles(arms: Iterable[str]) -> dict[str, ArmStyle]:
    """The style of every arm: fixed for the four of a usual run, in order of appearance for others."""
    styles: dict[str, ArmStyle] = {}
    for arm in arms:
        others = sum(name not in _KNOWN_ARMS for name in styles)
        styles[arm] = _KNOWN_ARMS.get(arm, _OTHER_ARMS[others % len(_OTHER_ARMS)])
    return styles


def new_axes() -> tuple[Figure, Axes]:
    """An empty figure of a panel's size."""
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.grid(axis="y", color=LINE, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.tick_params(length=0, pad=6, labelcolor=MUTED, color=LINE)
    return figure, axes


def as_svg(figure: Figure, alt: str, styles: Sequence[ArmStyle]) -> Markup:
    """The drawing as an <svg> element that scales with its box and inherits the page's font and colours."""
    buffer = io.StringIO()
    # Ids are hashed with the salt: equal on every run, different between the panels of one page.
    with mpl.rc_context({**_RC, "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = buffer.getvalue()
    body = body[body.index(">", body.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would reach the whole page
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # figure_1, axes_1: the same in every panel
    variables = {**_VARIABLES, **{style.colour: style.variable for style in styles}}
    for colour, variable in variables.items():
        body = body.replace(colour, f"var({variable}, {colour})")
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}"'
        ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        ' style="stroke-linejoin: round" font-family="inherit">'
    )
    return Markup(head + body)
