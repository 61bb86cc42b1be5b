"""Speed against TRL + PEFT, against transformers' `generate`, and against what the machine can do; in turn, in one go.

    python -m benchmarks [--repeats 5] [--parts training,growth,memory,decoding] [--dtypes float32]
    (or: make bench)

Writes benchmarks/results/latest.json, and growth.svg where that part is measured. What counts are the ratios of
neighbouring runs: median, min, max. Above 1 ours is faster; of `decode.overhead_*` 1 is the plain base. float32, and
bfloat16 as well where the machine multiplies it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import decoding, training
from benchmarks.about import about
from benchmarks.bases import default_base
from benchmarks.figure import draw_growth
from benchmarks.timing import Spread
from benchmarks.workload import Workload
from policypatch.files.atomic import write_json
from policypatch.logs import quiet_libraries
from policypatch.model.load import choose_dtype

RESULTS = Path(__file__).parent / "results"
PARTS = ("training", "growth", "memory", "decoding")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}  # of losses and gradients, ours against TRL's
PACKAGES = ("policypatch", "torch", "transformers", "trl", "peft")


def measured(dtype: str, parts: list[str], repeats: int) -> dict[str, Any]:
    """Everything asked for, in one precision."""
    load, work = partial(default_base, dtype), Workload()
    found: dict[str, Any] = {}
    if "training" in parts:
        found |= {name: training.stage(load, work, name, repeats, TOLERANCE[dtype]) for name in ("sft", "dpo")}
    if "memory" in parts:
        found["peak_bytes"] = {name: training.peaks(dtype, name) for name in ("sft", "dpo")}
    if "growth" in parts:
        found["growth"] = training.growth(load, work, repeats)
    if "decoding" in parts:
        found["overhead"] = decoding.overhead(load, repeats)
        found["sampling"] = decoding.sampling(load(), repeats)
    return found


def keys(found: dict[str, Any]) -> dict[str, Spread]:
    """The figures that are quoted, by their names."""
    named: dict[str, Spread] = {}
    for stage in ("sft", "dpo"):
        if stage in found:
            ratios = {f"{stage}.step_ratio_vs_{side}": value for side, value in found[stage]["ratio"].items()}
            named |= ratios | {f"{stage}.floor_share": found[stage]["floor_share"]}
        if "peak_bytes" in found:
            peak = found["peak_bytes"][stage]
            share = peak["ours"] / peak["trl"]
            named[f"{stage}.peak_memory_ratio"] = {"median": share, "min": share, "max": share}
    if "overhead" in found:
        for name, of in found["overhead"].items():
            if name != "plain":
                named[f"decode.overhead_{name}"] = of["per_token"]
        named["decode.first_token_patched"] = found["overhead"]["patched"]["first_token"]
        named["decode.sampling_ratio_vs_generate"] = found["sampling"]["ratio"]
    return named


def show(named: dict[str, Spread], title: str) -> None:
    """A table of the named figures."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right")
    for name, of in named.items():
        table.add_row(name, *(f"{of[column]:.3f}" for column in ("median", "min", "max")))
    Console().print(table)


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default=",".join(PARTS))
    fast = choose_dtype("auto") is torch.bfloat16
    parser.add_argument("--dtypes", default="float32,bfloat16" if fast else "float32")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts names {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    quiet_libraries()
    results = about(*PACKAGES) | {"workload": str(Workload()), "repeats": arguments.repeats}
    for dtype in arguments.dtypes.split(","):
        found = measured(dtype, parts, arguments.repeats)
        named = keys(found)
        show(named, dtype)
        results[dtype] = found
        if dtype == "float32":
            results |= named
            if "growth" in found:
                draw_growth(found["growth"], RESULTS / "growth.svg")
    write_json(RESULTS / "latest.json", results)


if __name__ == "__main__":
    main()
