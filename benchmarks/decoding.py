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

from benchmarks.timing import Spread, in_turn, ratio, spread
from benchmarks.workload import Workload
from policypatch.model.applied import apply, remove
from policypatch.model.base import Base
from policypatch.model.decode import sample
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
    """Time of each way / time of the plain base, to the first token and for each further one, of neighbouring runs."""
    base, tuned, adapted, merged = (load() for _ in range(4))
    tuning = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=PATCH)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=RANK, target_modules="all-linear")
    others: dict[str, Any] = {
        "peft": get_peft_model(tuned.model, tuning).eval(),
        "lora_unmerged": get_peft_model(adapted.model, lora).eval(),
        "lora_merged": get_peft_model(merged.model, lora).merge_and_unload().eval(),
    }
    found, plain = {}, []
    for name in ("patched", *others):
        pairs = []
        for turn in range(repeats + 1):
            both = {}
            # Which of the two comes first changes from pair to pair.
            for side in ("plain", name)[:: 1 if turn % 2 else -1]:
                with patched(base) if side == "patched" else nullcontext(others.get(side, base.model)) as model:
                    answered(model, base, WARMING)  # its weights and its code are at hand then, as they are in use
                    both[side] = answered(model, base, new_tokens)
            pairs.append((both["plain"], both[name]))
        (first, further), (own_first, own_further) = (zip(*of, strict=True) for of in zip(*pairs[1:], strict=True))
        found[name] = {
            "first_token": ratio(own_first, first),
            "per_token": ratio(own_further, further),
            "seconds_per_token": spread(own_further),
        }
        plain += further
    itself = ratio(plain, plain)
    return {"plain": {"first_token": itself, "per_token": itself, "seconds_per_token": spread(plain)}} | found


def sampling(base: Base, repeats: int, new_tokens: int = SAMPLED_TOKENS) -> dict[str, Spread]:
    """Tokens per second of both ways, and the ratio ours / generate of neighbouring runs."""
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
        seconds = in_turn({"ours": ours, "generate": theirs}, repeats)
    tokens = SAMPLED_PROMPTS * SAMPLES * new_tokens
    rates = {f"{name}_tokens_per_s": spread([tokens / s for s in of]) for name, of in seconds.items()}
    return rates | {"ratio": ratio(seconds["generate"], seconds["ours"])}
