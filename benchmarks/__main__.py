"""Speed against TRL + PEFT, against transformers' `generate`, and against what the machine can do; in turn, in one go.

    python -m benchmarks [--repeats 5] [--parts training,growth,memory,decoding] [--dtypes float32]
    (or: make bench)
    python -m benchmarks --base 7B     # of random weights, in bfloat16: for a GPU

Writes benchmarks/results/NAME.json, and a figure where growth is measured; NAME is latest, BASE or what --name says.
Parts that the file has of the same machine and packages, and that are not measured anew, stay in it, each with its day
and commit. What counts are the ratios of neighbouring runs: median, min, max. Above 1 ours is faster; of
`decode.overhead_*` 1 is the plain base (on Llama-2-7B the paper has 1.025 for a patch and 1.24 for LoRA). float32, and
bfloat16 as well where the machine multiplies it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoding, training
from benchmarks.about import about, now
from benchmarks.bases import default_base, release, shaped_base
from benchmarks.figure import draw_growth
from benchmarks.shapes import SHAPES, Shape
from benchmarks.tables import amounts, quoted, show
from benchmarks.workload import Workload
from policypatch.files.atomic import read_json, write_json
from policypatch.logs import quiet_libraries
from policypatch.model.load import choose_dtype

RESULTS = Path(__file__).parent / "results"
PARTS = ("training", "growth", "memory", "decoding")
CHECKED_LAYERS = 2  # of a base of random weights, on which both sides are compared
PACKAGES = ("policypatch", "torch", "transformers", "trl", "peft")


def measured(
    shape: Shape | None, dtype: str, parts: list[str], repeats: int, new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Everything asked for of a shape, or of the default base, in one precision; what there is after every part."""
    load = partial(default_base, dtype) if shape is None else partial(shaped_base, shape, dtype)
    work, found = Workload(), dict[str, Any]()
    if "training" in parts:
        for name in ("sft", "dpo"):
            found[name] = training.stage(load, work, name, repeats)
            release()
            yield found
    if "memory" in parts:
        found["peak_bytes"] = {name: training.peaks(dtype, name) for name in ("sft", "dpo")}
        yield found
    if "growth" in parts:
        found["growth"] = training.growth(load, work, repeats)
        release()
        yield found
    if "decoding" in parts:
        found["overhead"] = decoding.overhead(load, repeats, new_tokens)
        release()
        yield found
        found["sampling"] = decoding.sampling(load(), repeats)
        yield found


def compared(shape: Shape | None) -> dict[str, dict[str, dict[str, float]]]:
    """How far the sides of each stage are apart, by precision."""
    load = partial(default_base, "float32")
    if shape is not None:
        load = partial(shaped_base, shape, "float32", CHECKED_LAYERS)
    found = {}
    for name in ("sft", "dpo"):
        found[name] = training.agreed(load, Workload(), name)
        release()
    return found


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--base", choices=[shape.name for shape in SHAPES], help="the default model where left out")
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}; all, without memory for another base")
    parser.add_argument("--dtypes", help="float32, and bfloat16 where that is fast; bfloat16 alone for another base")
    parser.add_argument("--new-tokens", type=int, default=decoding.NEW_TOKENS, help="of an answer whose cost is timed")
    parser.add_argument("--name", help="of the files in results/; latest, or the base")
    arguments = parser.parse_args()
    shape = next((shape for shape in SHAPES if shape.name == arguments.base), None)
    name = arguments.name or arguments.base or "latest"
    if shape is not None and "memory" in (arguments.parts or ""):
        parser.error("--parts memory is of the default base: another one's is measured where it is trained, on a GPU")
    usual = [part for part in PARTS if shape is None or part != "memory"]
    parts = arguments.parts.split(",") if arguments.parts else usual
    fast = ["bfloat16"] if choose_dtype("auto") is torch.bfloat16 else []
    dtypes = arguments.dtypes.split(",") if arguments.dtypes else ["bfloat16"] if shape else ["float32", *fast]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts names {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    quiet_libraries()
    results = about(*PACKAGES) | {"workload": str(Workload()), "repeats": arguments.repeats}
    path = RESULTS / f"{name}.json"
    if path.is_file() and (known := read_json(path)) == known | results:
        results = known  # of the same machine and packages: parts that are not measured now stay as they are
    if "training" in parts:
        results["agreement"] = compared(shape)
    when = now()
    for dtype in dtypes:
        found: dict[str, Any] = {}
        for found in measured(shape, dtype, parts, arguments.repeats, arguments.new_tokens):
            told = results.get(dtype, {}).get("measured", {}) | dict.fromkeys(found, when)
            results[dtype] = results.get(dtype, {}) | found | {"measured": told}
            if dtype == ("bfloat16" if shape else "float32"):
                results |= quoted(found)
                if "growth" in found:
                    draw_growth(found["growth"], RESULTS / f"{'' if name == 'latest' else name + '-'}growth.svg")
            write_json(path, results)  # after every part: a machine may be had for less time than all of them take
        title = f"{arguments.base or 'the default base'}, {dtype}"
        show(amounts(found), f"{title}: {Workload()}")
        show(quoted(found), f"{title}: ratios")
    if "training" in parts and (misses := training.missed(results["agreement"])):
        sys.exit("\n".join(misses))


if __name__ == "__main__":
    main()
