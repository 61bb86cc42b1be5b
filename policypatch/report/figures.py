"""The figures of a run report: pure functions from figures to inline SVG.

Every panel is an SVG of its own, so that the page can lay them out for its width. Text stays text, the
background is transparent, and every colour is a CSS variable of the page with a fallback for a panel
that stands alone: `var(--arm-patch, #0072b2)`. The colours are those of Okabe and Ito, one for each arm,
and each arm has a dash pattern as well.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

CUTOFF = 0.5  # a score from here on counts as toxic, where the config does not say (RealToxicityPrompts)
_WIDTH, _HEIGHT = 360, 216  # user units; text is 11 of them, so that one unit is about one CSS pixel
_SMOOTH_FROM = 40  # points; a shorter curve is drawn as it is
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
_INK, _MUTED, _LINE = "#1b1f24", "#57606a", "#d0d7de"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line"}


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


def arm_styles(arms: Iterable[str]) -> dict[str, ArmStyle]:
    """The style of every arm: fixed for the four of a usual run, in order of appearance for others."""
    styles: dict[str, ArmStyle] = {}
    for arm in arms:
        others = sum(name not in _KNOWN_ARMS for name in styles)
        styles[arm] = _KNOWN_ARMS.get(arm, _OTHER_ARMS[others % len(_OTHER_ARMS)])
    return styles


def loss_curves(metrics: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """A panel for each stage and metric of `metrics.csv`; training and validation share one."""
    curves: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in metrics:
        part, _, name = str(row["metric"]).rpartition("/")
        points = curves.setdefault((str(row["stage"]), name), {}).setdefault(part, [])
        points.append((float(row["step"]), float(row["value"])))
    return [_loss_panel(stage, name, curves[stage, name]) for stage, name in sorted(curves, key=_curve_rank)]


def score_distributions(worst: Mapping[str, Mapping[str, Sequence[float]]], threshold: float = CUTOFF) -> list[Panel]:
    """A panel for each judge, from the worst score of every prompt by judge and arm.

    Drawn is the share of prompts whose worst continuation scores at least x: at the threshold the curve
    reads the toxic rate, and lower is better everywhere.
    """
    styles = arm_styles(dict.fromkeys(arm for by_arm in worst.values() for arm in by_arm))
    return [_distribution_panel(judge, by_arm, styles, threshold) for judge, by_arm in worst.items()]


def _curve_rank(key: tuple[str, str]) -> tuple[int, str, int, str]:
    stage, name = key
    stages, names = ("sft", "dpo"), ("loss", "margin", "accuracy")
    return (
        stages.index(stage) if stage in stages else len(stages),
        stage,
        names.index(name) if name in names else len(names),
        name,
    )


def _loss_panel(stage: str, name: str, parts: Mapping[str, list[tuple[float, float]]]) -> Panel:
    # What DPO trains is the patch: the curve has the colour of the arm that comes out of the stage.
    style = arm_styles(["patch" if stage == "dpo" else stage])["patch" if stage == "dpo" else stage]
    title = f"{stage.upper()} {name.replace('_', ' ').replace('nll', 'NLL')}"
    figure, axes = _axes()
    described, dropped = [], 0
    for part, points in parts.items():
        finite = sorted(point for point in points if math.isfinite(point[1]))
        dropped += len(points) - len(finite)
        if not finite:
            continue
        steps, values = [x for x, _ in finite], [y for _, y in finite]
        described.append(f"{part or name} from {values[0]:.3g} to {values[-1]:.3g}")
        if part == "val":
            axes.plot(steps, values, color=_INK, lw=1, ls=(0, (3, 2)), marker="o", ms=4, zorder=3)
        elif len(finite) < _SMOOTH_FROM:
            axes.plot(steps, values, color=style.colour, lw=1.8, marker="o" if len(finite) == 1 else None)
        else:
            axes.plot(steps, values, color=style.colour, lw=0.8, alpha=0.35)
            axes.plot(steps, _smooth(values), color=style.colour, lw=1.8)
    axes.set_xlabel("step", color=_MUTED)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    note = f"{dropped} values that are not finite are not drawn" if dropped else ""
    alt = f"{title} by step: " + ("; ".join(described) or "no finite value")
    return Panel(title, _svg(figure, alt, [style]), note)


def _distribution_panel(
    judge: str, by_arm: Mapping[str, Sequence[float]], styles: Mapping[str, ArmStyle], threshold: float
) -> Panel:
    figure, axes = _axes()
    top = max((max(scores) for scores in by_arm.values() if scores), default=1.0)
    bottom = min((min(scores) for scores in by_arm.values() if scores), default=0.0)
    unit = bottom >= 0 and top <= 1  # a judge whose scores are no probabilities gets its own range
    low, high = (0.0, 1.0) if unit else (bottom, top)
    described = []
    for arm, scores in by_arm.items():
        if not scores:
            continue
        ordered = sorted(scores)
        # The share of scores >= x is 1 - i/n up to and with the i-th score: it steps down just after it.
        xs = [low, *ordered, high]
        ys = [1.0, *(1 - i / len(ordered) for i in range(len(ordered))), 0.0]
        dash: Any = (0, styles[arm].dash) if styles[arm].dash else "-"
        axes.step(xs, ys, where="pre", color=styles[arm].colour, lw=1.8, ls=dash)
        share = sum(score >= threshold for score in scores) / len(scores)
        described.append(f"{arm} {share:.2f}" if unit else f"{arm} median {ordered[len(ordered) // 2]:.3g}")
    if unit:
        axes.axvline(threshold, color=_MUTED, lw=1, ls=(0, (2, 2)), zorder=1)
    axes.set_xlim(low, high if high > low else low + 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("worst score of a prompt, x", color=_MUTED)
    what = f"share of prompts at or above {threshold:g}" if unit else "worst scores"
    return Panel(judge, _svg(figure, f"{judge}, {what}: " + ", ".join(described), list(styles.values())))


def _smooth(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a twentieth of the curve, unbiased at its start."""
    keep = 1 - 1 / max(len(values) / 20, 2)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _axes() -> tuple[Figure, Axes]:
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.grid(axis="y", color=_LINE, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_color(_LINE)
        axes.tick_params(length=0, pad=6, labelcolor=_MUTED, color=_LINE)
    return figure, axes


def _svg(figure: Figure, alt: str, styles: Sequence[ArmStyle]) -> Markup:
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
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(alt)}"'
        ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        ' style="stroke-linejoin: round" font-family="inherit">'
    )
    return Markup(head + body)
