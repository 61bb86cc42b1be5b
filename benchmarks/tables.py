"""What a bench found, in the words and numbers that it prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.timing import Spread, spread
from benchmarks.workload import Workload


def quoted(found: dict[str, Any]) -> dict[str, Spread]:
    """The figures that are quoted, by their names."""
    named: dict[str, Spread] = {}
    for stage in ("sft", "dpo"):
        if stage in found:
            ratios = {f"{stage}.step_ratio_vs_{side}": value for side, value in found[stage]["ratio"].items()}
            named |= ratios | {f"{stage}.floor_share": found[stage]["floor_share"]}
        if "peak_bytes" in found:
            peak = found["peak_bytes"][stage]
            named[f"{stage}.peak_memory_ratio"] = spread([peak["ours"] / peak["trl"]])
        elif of := found.get(stage, {}).get("step_bytes"):
            whole = found[stage]["base_bytes"]
            named[f"{stage}.peak_memory_ratio"] = spread([(whole + of["ours"]) / (whole + of["trl"])])
    if "overhead" in found:
        for name, of in found["overhead"].items():
            if name != "plain":
                named[f"decode.overhead_{name}"] = of["per_token"]
        if vs_peft := found["overhead"]["patched"].get("per_token_vs_peft"):  # no figures from before it have it
            named["decode.patched_vs_peft"] = vs_peft
        named["decode.first_token_patched"] = found["overhead"]["patched"]["first_token"]
    if "sampling" in found:
        named["decode.sampling_ratio_vs_generate"] = found["sampling"]["ratio"]
    if patches := found.get("growth", {}).get("patch"):
        named["dpo.patch_growth_vs_own_tokens"] = spread([own_growth(patches)])
    return named


def own_growth(patches: Mapping[str, Mapping[str, Any]]) -> float:
    """What a vector more costs / what an average token of the usual step costs: medians, least to longest patch."""
    sizes = sorted(patches, key=int)
    least, most = (patches[size]["seconds"]["median"] for size in (sizes[0], sizes[-1]))
    return (most - least) / (int(sizes[-1]) - int(sizes[0])) / average_token(patches)


def average_token(patches: Mapping[str, Mapping[str, Any]]) -> float:
    """Seconds of the usual step / its tokens, among steps of patches of several lengths."""
    usual = patches[str(Workload.patch)]
    return float(usual["seconds"]["median"] / usual["tokens"])


def amounts(found: Mapping[str, Any]) -> dict[str, Spread]:
    """Times, rates and memory that the ratios are made of, by their names and units."""
    named: dict[str, Spread] = {}
    for stage in ("sft", "dpo"):
        if of := found.get(stage):
            named |= {f"{stage}, a step, {side}, s": seconds for side, seconds in of["seconds"].items()}
            named[f"{stage}, a step, floor, s"] = of["floor_s"]
            named[f"{stage}, tokens a second, ours"] = of["tokens_per_s"]
            named[f"{stage}, padding of the tokens read, %"] = spread([100 * of["padding_share"]])
        peaks, steps = found.get("peak_bytes", {}).get(stage, {}), found.get(stage, {}).get("step_bytes", {})
        named |= {f"{stage}, most memory, {side}, GB": spread([held / 1e9]) for side, held in peaks.items()}
        named |= {f"{stage}, memory of a step, {side}, GB": spread([held / 1e9]) for side, held in steps.items()}
    for name, of in found.get("overhead", {}).items():
        named[f"an answer's token, {name}, ms"] = _times(1e3, of["seconds_per_token"])
    for name, of in found.get("sampling", {}).items():
        if name != "ratio":
            named[f"sampling, tokens a second, {name.removesuffix('_tokens_per_s')}"] = of
    return named


def _times(factor: float, of: Spread) -> Spread:
    return {name: factor * value for name, value in of.items()}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def show(named: Mapping[str, Spread], title: str) -> None:
    """A table of figures."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right")
    for name, of in named.items():
        table.add_row(name, *(_number(of[column]) for column in ("median", "min", "max")))
    Console().print(table)
