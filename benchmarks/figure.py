"""How a DPO step grows with each part of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.tables import average_token
from policypatch.files.atomic import atomic_path

NAMES = {
    "pairs": "pairs a step",
    "prompt": "tokens of a prompt",
    "completion": "tokens of a completion",
    "patch": "vectors of the patch",
}


def draw_growth(growth: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel for each part: seconds of a step, from the fastest run to the slowest, and the floor.

    Beside a patch's length: a step of the shortest one, and for each vector more what an average token takes.
    """
    figure = Figure(figsize=(3 * len(growth), 3), layout="constrained")
    for axes, (part, sizes) in zip(figure.subplots(1, len(growth), sharey=True), growth.items(), strict=True):
        x = [int(size) for size in sizes]
        seconds = [of["seconds"] for of in sizes.values()]
        axes.fill_between(x, [s["min"] for s in seconds], [s["max"] for s in seconds], alpha=0.2)
        axes.plot(x, [s["median"] for s in seconds], "o-", label="a DPO step")
        axes.plot(x, [of["floor_s"] for of in sizes.values()], "--", color="0.5", label="its matrix products alone")
        if part == "patch":
            token = average_token(sizes)
            axes.plot(x, [seconds[0]["median"] + token * (n - x[0]) for n in x], ":", label="its own tokens more")
            axes.legend(frameon=False)
        axes.set_xlabel(NAMES[part])
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
