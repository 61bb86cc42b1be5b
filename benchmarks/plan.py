"""Memory and time of a run on bases and machines that are not at hand, from a model of what a run does.

    python -m benchmarks.plan            # the table of docs/scale.md
    python -m benchmarks.plan --check    # what the model says of this machine and the default base, beside measurement

What is counted: matrix products (forward, and backward to the input: no weight has a gradient), weights and keys and
values read, weights collected from other ranks. What is not: loading, judges, the scorer of perplexity, Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.shapes import SHAPES, SMOLLM2, Shape
from benchmarks.workload import Workload


@dataclass(frozen=True)
class Machine:
    """What a device does.

    Attributes:
        rate: operations a second of matrix products, as reached.
        reads: bytes a second from its memory, as reached.
        collects: bytes a second from other devices, as reached, within a machine and between machines.
        call: seconds that Python takes to ask a device for a layer's forward, while which it may have nothing to do.
        memory: bytes.
        number: bytes of a weight.
    """

    rate: float
    reads: float
    collects: tuple[float, float]
    memory: float
    call: float
    number: int = 2


# 989 Tflop/s, 3.35 TB/s, NVLink and 400 Gbit/s a GPU on paper; the shares reached are assumptions, not measurements.
# A layer's call: measured with layers that have next to nothing to do (--check), on a CPU.
H100 = Machine(rate=0.4 * 989e12, reads=0.6 * 3.35e12, collects=(250e9, 40e9), memory=80e9, call=0.6e-3)
# The default toxicity run: prompts x samples for pairs; of three arms' evaluation; steps; rows decoded at once.
PAIRS, EVALUATED, SFT_STEPS, DPO_STEPS, ROWS, NEW = 800 * 8, 3 * 250 * 8, 30, 200, 128, 20
GPUS_OF_A_MACHINE = 8
# What was measured of what the model says of the 7B shape on an H200 (results/7B.json): memory of a DPO step beside the
# base (2.03 of 1.96 GB), time of one among its like (75 of 58 ms).
MEMORY_OF_MODEL, TIME_OF_MODEL = 1.05, 1.3


def activations(shape: Shape, number: int) -> int:
    """Bytes a token leaves in a layer for the backward pass, frozen weights asking for nothing.

    Two norms keep their input in float32; attention its queries, keys, values (heads that share them written out) and
    output; the MLP its gate, what the activation makes of it, and what that is multiplied by.
    """
    return 2 * 4 * shape.width + number * (4 * shape.width + 3 * shape.inner)


def weights(shape: Shape, machine: Machine, share: int) -> float:
    """Bytes of the base that a rank holds, of which `share` ranks each have a part; two layers are there whole."""
    held = shape.layers * shape.layer / share + (2 * shape.layer if share > 1 else 0)
    return machine.number * (held + shape.whole)


def step_memory(shape: Shape, machine: Machine, work: Workload, share: int = 1) -> float:
    """Bytes of a DPO step: the base, what its tokens leave in the layers, and embeddings and states of all."""
    tokens = work.patch + work.pairs * (work.prompt + 2 * work.completion)
    return weights(shape, machine, share) + tokens * shape.layers * activations(shape, machine.number)


def decoding_memory(shape: Shape, machine: Machine, work: Workload, share: int = 1) -> float:
    """Bytes while `ROWS` completions are decoded: the base, keys and values, and their logits in float32."""
    positions = work.patch + work.prompt + NEW
    kept = ROWS * positions * shape.layers * 2 * shape.keys * machine.number
    return weights(shape, machine, share) + kept + ROWS * shape.vocabulary * 4


def collecting(shape: Shape, machine: Machine, share: int) -> float:
    """Seconds in which a rank collects the layers that it has a share of."""
    if share == 1:
        return 0.0
    speed = machine.collects[share > GPUS_OF_A_MACHINE]
    return machine.number * shape.layers * shape.layer * (1 - 1 / share) / speed


def step_seconds(shape: Shape, machine: Machine, work: Workload, completions: int, ranks: int, share: int = 1) -> float:
    """Seconds of a step, of which every rank reads its rows and all the patch: products or collecting, the longer."""
    rows = -(-work.pairs // ranks)
    tokens = work.patch + rows * (work.prompt + completions * work.completion)
    predicted = rows * completions * work.completion
    operations = 4 * (tokens * shape.layers * shape.layer + predicted * shape.vocabulary * shape.width)
    reads = 2 * weights(shape, machine, 1) / machine.reads
    calls = 3 * shape.layers * machine.call  # backward, by what one sees, as two forwards
    return max(operations / machine.rate, reads, calls, 2 * collecting(shape, machine, share))


def decoding_seconds(shape: Shape, machine: Machine, work: Workload, completions: int, ranks: int, share: int) -> float:
    """Seconds in which `completions` of `NEW` tokens are drawn, a batch of `ROWS` on each rank after another."""
    batches = -(-completions // (ROWS * ranks))
    rows = min(ROWS, -(-completions // ranks))
    operations = 2 * rows * (shape.layers * shape.layer + shape.vocabulary * shape.width)
    positions = work.patch + work.prompt + NEW / 2
    read = weights(shape, machine, 1) + rows * positions * shape.layers * 2 * shape.keys * machine.number
    work_of_a_token = operations / machine.rate + read / machine.reads
    token = max(work_of_a_token, shape.layers * machine.call, collecting(shape, machine, share))
    return batches * NEW * token


def table() -> str:
    """Of the three bases on 1, 8 and 64 GPUs, in Markdown."""
    work = Workload()
    lines = [
        "| base | GPUs | trainer | GB a GPU, training | GB, decoding | pairs | SFT, DPO | evaluation | together |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape in SHAPES:
        for gpus in (1, 8, 64):
            fits = max(step_memory(shape, H100, work), decoding_memory(shape, H100, work)) < 0.9 * H100.memory
            share = 1 if fits else gpus
            held = weights(shape, H100, share)
            needed = [
                held + MEMORY_OF_MODEL * (f(shape, H100, work, share) - held) for f in (step_memory, decoding_memory)
            ]
            memory = [f"{n / 1e9:.0f}" for n in needed]
            name = {1: "gpu"}.get(gpus, "ddp") if fits else "fsdp"
            if max(needed) > 0.9 * H100.memory:
                lines.append(f"| {shape.name} | {gpus} | does not fit | {' | '.join(memory)} | | | | |")
                continue
            steps = [(SFT_STEPS, 1), (DPO_STEPS, 2)]
            seconds = [
                decoding_seconds(shape, H100, work, PAIRS, gpus, share),
                sum(n * TIME_OF_MODEL * step_seconds(shape, H100, work, c, gpus, share) for n, c in steps),
                decoding_seconds(shape, H100, work, EVALUATED, gpus, share),
            ]
            times = [duration(s) for s in [*seconds, sum(seconds)]]
            lines.append(f"| {shape.name} | {gpus} | {name} | {' | '.join([*memory, *times])} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """For a table."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def check() -> str:
    """The model of this machine and the default base, beside what was measured here and now."""
    from benchmarks.bases import default_base
    from benchmarks.floor import matmul_rate
    from benchmarks.ours import Ours
    from benchmarks.timing import in_turn, spread

    work = Workload()
    peaks = {
        side: int(subprocess.check_output([sys.executable, "-m", "benchmarks.memory", "--side", side]).split()[-1])
        for side in ("none", "ours")
    }
    base = default_base("float32")
    call = call_of_a_layer()
    machine = Machine(matmul_rate(base.model, 512, 100), float("inf"), (1.0, 1.0), 0, call, number=4)
    seconds = spread(in_turn({"ours": Ours(base, work, "dpo").step}, 5)["ours"])
    said = step_memory(SMOLLM2, machine, work) - weights(SMOLLM2, machine, 1)
    return (
        f"a DPO step of {SMOLLM2.name}, {work}:\n"
        f"  activations  model {said / 1e6:.0f} MB, measured {(peaks['ours'] - peaks['none']) / 1e6:.0f} MB\n"
        f"  time         model {step_seconds(SMOLLM2, machine, work, 2, 1):.2f} s at {machine.rate / 1e9:.0f} Gop/s, "
        f"measured {seconds['median']:.2f} s ({seconds['min']:.2f} to {seconds['max']:.2f})\n"
        f"  a layer's call {call * 1e3:.2f} ms"
    )


def call_of_a_layer() -> float:
    """Seconds of a layer's forward on one token where the layer is so narrow that nothing but its call takes time."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    from benchmarks.timing import timed

    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=30, num_attention_heads=1
    )
    model, token = LlamaModel(config).eval(), torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        return min(timed(lambda: model(token)) for _ in range(20)) / config.num_hidden_layers


def main() -> None:
    """Print one of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    sys.stdout.write(f"{check() if parser.parse_args().check else table()}\n")


if __name__ == "__main__":
    main()
