"""Answers: what a patch costs whoever generates with it, beside PEFT's prompt tuning and LoRA; and sampling for pairs.

`overhead` times transformers' own `generate` for one prompt, greedily: the plain base, the base with a patch applied
(`policypatch.apply`), PEFT's prompt tuning of as many vectors, and LoRA (rank 16, all linear layers) unmerged and
merged. `sampling` times k samples of each of several prompts, as pairs and evaluation need them, against `generate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from benchmarks.timing import Spread, bracketed, spread
from benchmarks.workload import Workload
from policypatch.model.applied import apply, remove
from policypatch.model.base import Base
from policypatch.model.decode import sample
from policypatch.model.latency import undisturbed
from policypatch.model.sampling import Sampling

Load = Callable[[], Base]
PROMPT, NEW_TOKENS, PATCH, RANK = 32, 256, Workload.patch, 16
WARMING = 4  # tokens of an answer that is not timed
SAMPLED_PROMPTS, SAMPLES, SAMPLED_TOKENS = 12, 8, 20


class Clock(BaseStreamer):
    """When the prompt was handed over and each token came."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called once for the prompt, then for every token."""
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def answered(model: Any, base: Base, new_tokens: int) -> tuple[float, float]:
    """Seconds from the call to the first token, and for each further one."""
    ids = torch.randint(100, len(base.tokenizer), (1, PROMPT), generator=torch.Generator().manual_seed(0))
    ids = ids.to(base.model.device)
    with undisturbed():
        clock, start = Clock(), time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=base.eos[0],
            streamer=clock,
        )
    ticks = clock.ticks[-new_tokens:]
    return ticks[0] - start, (ticks[-1] - ticks[0]) / (new_tokens - 1)


@contextmanager
def patched(base: Base) -> Iterator[Any]:
    """The base's own model behind a patch."""
    apply(base.model, base.embedding[:PATCH].detach().clone())
    try:
        yield base.model
    finally:
        remove(base.model)


def overhead(load: Load, repeats: int, new_tokens: int = NEW_TOKENS) -> dict[str, dict[str, Spread]]:
    """Time of each way / time of the plain base, to the first token and for each further one.

    An answer of the plain base stands before and after every other one, and their mean is what that one is held
    against; which way comes after which changes from turn to turn. The plain base's own ratios are those of each answer
    to the one before it: what the machine does by itself.
    """
    base, adapted, merged = (load() for _ in range(3))
    tuning = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PATCH)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=RANK, target_modules="all-linear")
    ways: dict[str, Any] = {
        "patched": base.model,
        "peft": get_peft_model(base.model, tuning).eval(),  # which puts nothing into the model
        "lora_unmerged": get_peft_model(adapted.model, lora).eval(),
        "lora_merged": get_peft_model(merged.model, lora).merge_and_unload().eval(),
    }

    def asked(name: str) -> tuple[float, float]:
        with patched(base) if name == "patched" else nullcontext(ways.get(name, base.model)) as model:
            answered(model, base, WARMING)  # its weights and its code are at hand then, as they are in use
            return answered(model, base, new_tokens)

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ("plain", *ways)}
    against: dict[str, list[tuple[float, float]]] = {name: [] for name in seconds}
    for turn in range(repeats + 1):
        before, start = asked("plain"), turn % len(ways)
        for name in [*ways][start:] + [*ways][:start]:
            own, after = asked(name), asked("plain")
            if turn:  # the first one allocates
                seconds[name].append(own)
                seconds["plain"].append(after)
                against[name].append((2 * own[0] / (before[0] + after[0]), 2 * own[1] / (before[1] + after[1])))
                against["plain"].append((after[0] / before[0], after[1] / before[1]))
            before = after
    found = {
        name: {
            "first_token": spread([first for first, _ in against[name]]),
            "per_token": spread([further for _, further in against[name]]),
            "seconds_per_token": spread([further for _, further in seconds[name]]),
        }
        for name in seconds
    }
    both = zip(against["patched"], against["peft"], strict=True)
    found["patched"]["per_token_vs_peft"] = spread([ours[1] / theirs[1] for ours, theirs in both])
    return found


def sampling(base: Base, repeats: int, new_tokens: int = SAMPLED_TOKENS) -> dict[str, Spread]:
    """Tokens per second of both ways, and the time of generate / ours before and after it."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, len(base.tokenizer), (SAMPLED_PROMPTS, Workload.prompt), generator=random)
    patch = base.embedding[torch.randint(0, len(base.tokenizer), (PATCH,), generator=random)].detach()
    how = Sampling(1.0, 0.9, new_tokens, new_tokens)

    def ours() -> None:
        sample(base.model, prompts.tolist(), patch, SAMPLES, how, eos=base.eos)

    def theirs() -> None:
        embeddings = base.model.get_input_embeddings()(prompts.to(base.model.device))
        whole = torch.cat([patch.to(embeddings.dtype).expand(len(prompts), -1, -1), embeddings], 1)
        base.model.generate(
            inputs_embeds=whole,
            attention_mask=torch.ones(whole.shape[:2], dtype=torch.long, device=whole.device),
            do_sample=True,
            top_p=0.9,
            top_k=0,
            num_return_sequences=SAMPLES,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=base.eos[0],
        )

    with torch.inference_mode():
        own, seconds, ratios = bracketed(lambda _: ours(), {"generate": lambda _: theirs()}, repeats)
    tokens = SAMPLED_PROMPTS * SAMPLES * new_tokens
    return {
        "ours_tokens_per_s": spread([tokens / s for runs in own for s in runs]),
        "generate_tokens_per_s": spread([tokens / s for s in seconds["generate"]]),
        "ratio": spread(ratios["generate"]),
    }
