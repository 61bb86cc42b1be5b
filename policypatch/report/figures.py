"""The figures of a run report: pure functions from figures to inline SVG (`policypatch.report.drawing`)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from policypatch.report.drawing import INK, MUTED, ArmStyle, Panel, arm_styles, as_svg, new_axes

CUTOFF = 0.5  # a score from here on counts as toxic, where the config does not say (RealToxicityPrompts)
_SMOOTH_FROM = 40  # points; a shorter curve is drawn as it is


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
    figure, axes = new_axes()
    described, dropped = [], 0
    for part, points in parts.items():
        finite = sorted(point for point in points if math.isfinite(point[1]))
        dropped += len(points) - len(finite)
        if not finite:
            continue
        steps, values = [x for x, _ in finite], [y for _, y in finite]
        described.append(f"{part or name} from {values[0]:.3g} to {values[-1]:.3g}")
        if part == "val":
            axes.plot(steps, values, color=INK, lw=1, ls=(0, (3, 2)), marker="o", ms=4, zorder=3)
        elif len(finite) < _SMOOTH_FROM:
            axes.plot(steps, values, color=style.colour, lw=1.8, marker="o" if len(finite) == 1 else None)
        else:
            axes.plot(steps, values, color=style.colour, lw=0.8, alpha=0.35)
            axes.plot(steps, _smooth(values), color=style.colour, lw=1.8)
    axes.set_xlabel("step", color=MUTED)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    note = f"{dropped} values that are not finite are not drawn" if dropped else ""
    alt = f"{title} by step: " + ("; ".join(described) or "no finite value")
    return Panel(title, as_svg(figure, alt, [style]), note)


def _distribution_panel(
    judge: str, by_arm: Mapping[str, Sequence[float]], styles: Mapping[str, ArmStyle], threshold: float
) -> Panel:
    figure, axes = new_axes()
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
        axes.axvline(threshold, color=MUTED, lw=1, ls=(0, (2, 2)), zorder=1)
    axes.set_xlim(low, high if high > low else low + 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("worst score of a prompt, x", color=MUTED)
    what = f"share of prompts at or above {threshold:g}" if unit else "worst scores"
    return Panel(judge, as_svg(figure, f"{judge}, {what}: " + ", ".join(described), list(styles.values())))


def _smooth(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a twentieth of the curve, unbiased at its start."""
    keep = 1 - 1 / max(len(values) / 20, 2)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
