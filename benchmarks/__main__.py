"""Speed of a DPO step and of sampling against the obvious way of each, and what an applied patch costs, interleaved.

    python -m benchmarks [--repeats 5]        (or: make bench)

The machine's noise hits both sides alike, so the ratio of neighbouring runs is what counts: median, min, max.
Writes benchmarks/results/latest.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console

from benchmarks.applied import NEW_TOKENS as NEW
from benchmarks.applied import overhead
from policypatch.files.atomic import write_json
from policypatch.model.backbone import PrefixBackbone, plain_logits
from policypatch.model.base import Base, load_base
from policypatch.model.decode import sample
from policypatch.model.sampling import Sampling
from policypatch.model.tree import Item

ROOT = Path(__file__).parent
PAIRS, PROMPT, COMPLETION, PATCH = 8, 14, 19, 50
SAMPLED_PROMPTS, SAMPLES, NEW_TOKENS = 12, 8, 20


def spread(values: list[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of both and the ratio theirs / ours of neighbouring runs."""
    ours(), theirs()  # the first run of each allocates
    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    return {
        "ours_s": spread([a for a, _ in pairs]),
        "theirs_s": spread([b for _, b in pairs]),
        "ratio": spread([b / a for a, b in pairs]),
    }


def dpo_step(base: Base, repeats: int) -> dict[str, dict[str, float]]:
    """Forward and backward of `PAIRS` pairs: the tree against one concatenated sequence for each completion."""
    random = torch.Generator().manual_seed(0)
    vocabulary, width = base.embedding.shape

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (n,), generator=random).tolist())

    items = [Item(draw(PROMPT), (draw(COMPLETION), draw(COMPLETION))) for _ in range(PAIRS)]
    backbone = PrefixBackbone(base.model, torch.randn(PATCH, width, generator=random) * 0.1)

    def tree() -> None:
        backbone.sequence_logprobs(backbone.tree(items)).sum().backward()

    def concatenated() -> None:
        rows = [(item.prompt, completion) for item in items for completion in item.completions]
        embeddings = base.model.get_input_embeddings()(torch.tensor([[*p, *c] for p, c in rows]))
        patch = backbone.patch.to(embeddings.dtype).expand(len(rows), -1, -1)
        output = base.model(inputs_embeds=torch.cat([patch, embeddings], 1), use_cache=False)
        logprobs = output.logits[:, PATCH + PROMPT - 1 : -1].float().log_softmax(-1)
        targets = torch.tensor([c for _, c in rows])
        logprobs.gather(2, targets[..., None]).sum().backward()

    expected = plain_logits(base.model, backbone.patch, list(items[0].prompt), list(items[0].completions[0]))
    ours = backbone.logits(backbone.tree(items))[:COMPLETION]
    if (ours - expected).abs().max() > (1e-3 if base.model.dtype == torch.float32 else 0.5):
        raise SystemExit("the tree and plain concatenation disagree: the timing would compare different work")
    return interleaved(tree, concatenated, repeats)


def sampling(base: Base, repeats: int) -> dict[str, dict[str, float]]:
    """k samples of each prompt behind a patch: ours against transformers' generate on the same prompts."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, base.embedding.shape[0], (SAMPLED_PROMPTS, PROMPT), generator=random)
    patch = base.embedding[torch.randint(0, 1000, (PATCH,), generator=random)].detach()
    ours_how = Sampling(1.0, 0.9, NEW_TOKENS, NEW_TOKENS)

    def ours() -> None:
        sample(base.model, prompts.tolist(), patch, SAMPLES, ours_how, eos=base.eos)

    def theirs() -> None:
        embeddings = base.model.get_input_embeddings()(prompts)
        whole = torch.cat([patch.to(embeddings.dtype).expand(len(prompts), -1, -1), embeddings], 1)
        base.model.generate(
            inputs_embeds=whole,
            attention_mask=torch.ones(whole.shape[:2], dtype=torch.long),
            do_sample=True,
            top_p=0.9,
            top_k=0,
            num_return_sequences=SAMPLES,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=base.eos[0],
        )

    with torch.inference_mode():
        found = interleaved(ours, theirs, repeats)
    tokens = SAMPLED_PROMPTS * SAMPLES * NEW_TOKENS
    return found | {"ours_tokens_per_s": spread([tokens / s for s in found["ours_s"].values()])}


def main() -> None:
    """Measure in float32 and in bfloat16, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    cfg = OmegaConf.load(ROOT.parent / "conf" / "model" / "smollm2_135m.yaml")
    results: dict[str, object] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("policypatch", "torch", "transformers")},
        "batch": {"pairs": PAIRS, "prompt": PROMPT, "completion": COMPLETION, "patch": PATCH},
        "decode": {"prompts": SAMPLED_PROMPTS, "k": SAMPLES, "new_tokens": NEW_TOKENS},
    }
    console = Console()
    for dtype in ("float32", "bfloat16"):
        base = load_base(OmegaConf.merge(cfg, {"dtype": dtype}))
        found = {
            "dpo.step_ratio_vs_concatenated": dpo_step(base, repeats),
            "decode.sampling_ratio_vs_generate": sampling(base, repeats),
        }
        applied = overhead(base, repeats)
        results[dtype] = found | {f"applied.{name}_ratio_vs_plain": {"ratio": ratio} for name, ratio in applied.items()}
        for name, figures in found.items():
            ratio, ours = figures["ratio"], figures["ours_s"]
            console.print(
                f"{dtype:9} {name}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), "
                f"ours {ours['median']:.2f} s"
            )
        for name, ratio in applied.items():
            console.print(
                f"{dtype:9} applied.{name}_ratio_vs_plain: {ratio['median']:.3f} ({ratio['min']:.3f} to "
                f"{ratio['max']:.3f}), {NEW} new tokens"
            )
    write_json(ROOT / "results" / "latest.json", results)


if __name__ == "__main__":
    main()
