"""Decoding with a patch in front: the patch and what all prompts begin with once per call, a prompt once for its k
samples, finished rows leave.

Right padding after each prompt would leave holes in the cache, so prompts are left-padded; positions and mask are
explicit, and a test holds the result to full recomputation without a cache and to any padding side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from policypatch.errors import PolicyPatchError
from policypatch.model.head import finish_logits
from policypatch.model.parts import context_of, decoder_of, sliding_window
from policypatch.model.sampling import Sampling, next_tokens, uniforms
from policypatch.model.tree import common_prefix

ROOM_TO_COMPACT = 0.75  # when fewer than this share of the rows are alive, the others leave the batch


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes into room reserved at the start; DynamicLayer copies everything at every token."""

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        super().__init__()
        rows, heads, self.length, width = keys.shape
        self._keys = keys.new_empty(rows, heads, self.length + room, width)
        self._values = values.new_empty(rows, heads, self.length + room, values.shape[-1])
        self._keys[:, :, : self.length] = keys
        self._values[:, :, : self.length] = values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        self._show()
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self._show()


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    patch: Tensor | None = None,
    k: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    eos: Sequence[int] = (),
    max_rows: int = 256,
    known: Mapping[int, list[list[int]]] | None = None,
    finished: Callable[[list[int], list[list[list[int]]]], None] = lambda numbers, completions: None,
    tick: Callable[[], None] = lambda: None,
) -> list[list[list[int]]]:
    """Draw k completions for each prompt.

    Args:
        model: the frozen base.
        prompts: token ids, at least one each.
        patch: (P, D) vectors that stand in front of every prompt, or None.
        k: samples a prompt.
        sampling: temperature, top_p, lengths.
        seed: with the prompt's tokens and the sample's number it fixes the sample, whatever else is in the batch.
        eos: tokens that end a completion; they are not part of what is returned.
        max_rows: completions decoded at once.
        known: the completions of some prompts, by their numbers; batches in which all are known are not decoded.
        finished: called with the prompts' numbers and completions of every batch, those that are known as well.
        tick: called whenever every completion of a batch has got another token, for who wants to time it.

    Returns:
        for each prompt its k completions as token ids.

    Raises:
        PolicyPatchError: a prompt that, with patch and new tokens, exceeds the context, or an empty prompt.
    """
    sampling = sampling or Sampling()
    patch = None if patch is None or patch.shape[0] == 0 else patch.to(model.device, model.dtype)
    _check_lengths(model, prompts, 0 if patch is None else patch.shape[0], sampling)
    results: list[list[list[int]]] = [[] for _ in prompts]
    # What all prompts begin with (a system message, a teacher's instruction) is computed once, as the patch is; each
    # keeps a token of its own, whose state predicts the first new one. A single prompt shares nothing: it is one pass.
    alone = len(prompts) == 1
    shared = 0 if alone else min([common_prefix(prompts), *(len(prompt) - 1 for prompt in prompts)])
    root = _root(model, patch, prompts[0][:shared]) if prompts and not alone else None
    front = patch if alone else None  # no cache of its own
    before = 0 if root is None else root.get_seq_length()
    for batch in _batches(model, [prompt[shared:] for prompt in prompts], before, max(1, max_rows // k), sampling):
        if known is not None and all(i in known for i in batch):
            made = [known[i] for i in batch]
        else:
            rows = [prompts[i] for i in batch]
            made = _sample_batch(model, rows, shared, root, front, k, sampling, seed, eos, tick)
        for i, completions in zip(batch, made, strict=True):
            results[i] = completions
        finished(batch, made)
    return results


def _root(model: PreTrainedModel, patch: Tensor | None, shared: Sequence[int]) -> DynamicCache | None:
    """Keys and values of the patch and of what all prompts begin with; None where there is neither."""
    parts = [] if patch is None else [patch]
    if shared:
        parts.append(model.get_input_embeddings()(torch.tensor(list(shared), device=model.device)))
    return _forward(model, torch.cat(parts)[None], None, DynamicCache(), 0)[1] if parts else None


def _batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], n_root: int, size: int, sampling: Sampling
) -> Iterator[list[int]]:
    """Prompt numbers, at most `size` together, of similar length so that there is little padding."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    window = sliding_window(model)
    batch: list[int] = []
    for i in order:
        # A sliding layer counts places, not positions: padding after the patch would push the patch out too early.
        too_far = window is not None and n_root + len(prompts[i]) + sampling.max_new_tokens > window
        ragged = too_far and batch and len(prompts[i]) != len(prompts[batch[0]])
        if len(batch) == size or ragged:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _check_lengths(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], patch_length: int, sampling: Sampling
) -> None:
    limit = context_of(model.config)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise PolicyPatchError(f"prompt {i} has no tokens: give it text or drop it")
        need = patch_length + len(prompt) + sampling.max_new_tokens
        if limit is not None and need > limit:
            raise PolicyPatchError(
                f"prompt {i} needs {need} positions ({patch_length} patch + {len(prompt)} prompt + "
                f"{sampling.max_new_tokens} new) but the model's context is {limit}: shorten or drop it"
            )


def _sample_batch(
    model: PreTrainedModel,
    whole: list[Sequence[int]],
    shared: int,
    root: DynamicCache | None,
    front: Tensor | None,
    k: int,
    sampling: Sampling,
    seed: int,
    eos: Sequence[int],
    tick: Callable[[], None],
) -> list[list[list[int]]]:
    prompts = [prompt[shared:] for prompt in whole]
    device, rows = model.device, len(prompts)
    n_root = 0 if root is None else root.get_seq_length()
    width = max(map(len, prompts))
    ids = torch.zeros(rows, width, dtype=torch.long)
    real = torch.zeros(rows, width, dtype=torch.bool)
    for r, prompt in enumerate(prompts):
        ids[r, width - len(prompt) :] = torch.tensor(list(prompt))
        real[r, width - len(prompt) :] = True
    ids, real = ids.to(device), real.to(device)
    seen = torch.cat([torch.ones(rows, n_root, dtype=torch.bool, device=device), real], 1)
    cache = DynamicCache()
    if root is not None:
        for i, layer in enumerate(root.layers):
            cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), i)
    embeddings = model.get_input_embeddings()(ids)
    if front is not None:  # vectors before a prompt that has no padding
        embeddings = torch.cat([front[None], embeddings], 1)
        seen = torch.cat([seen.new_ones(1, len(front)), seen], 1)
    states, cache = _forward(model, embeddings, seen, cache, n_root)

    spread = torch.arange(rows, device=device).repeat_interleave(k)
    roomy = DynamicCache()
    roomy.layers = [
        _RoomyLayer(layer.keys[spread], layer.values[spread], sampling.max_new_tokens) for layer in cache.layers
    ]
    seen, last = seen[spread], states[spread, -1]
    keys = [row_key(whole[r], s) for r in range(rows) for s in range(k)]
    draws = uniforms(seed, keys, sampling.max_new_tokens).to(device)
    ending = torch.tensor(list(eos), dtype=torch.long, device=device)
    written = torch.full((rows * k, sampling.max_new_tokens), -1, dtype=torch.long, device=device)
    alive = torch.arange(rows * k, device=device)
    head = model.get_output_embeddings()
    for step in range(sampling.max_new_tokens):
        logits = finish_logits(model, head(last)).float()
        if step < sampling.min_new_tokens and len(ending):
            logits[:, ending] = -torch.inf
        tokens = next_tokens(logits, sampling, draws[alive, step])
        tick()
        going = ~torch.isin(tokens, ending)
        written[alive, step] = torch.where(going, tokens, -1)
        # A row that has ended and still stands in the batch must not write again.
        ended = (written[alive, :step] == -1).any(1)
        written[alive[ended], step] = -1
        going &= ~ended
        if step + 1 == sampling.max_new_tokens or not going.any():
            break
        if going.float().mean() < ROOM_TO_COMPACT:
            stay = going.nonzero()[:, 0]
            alive, tokens, seen = alive[stay], tokens[stay], seen[stay]
            for layer in roomy.layers:
                layer.keep(stay)
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
        states, roomy = _forward(model, model.get_input_embeddings()(tokens[:, None]), seen, roomy, None)
        last = states[:, -1]
    completions = [[t for t in row if t >= 0] for row in written.tolist()]
    return [completions[r * k : (r + 1) * k] for r in range(rows)]


def _forward(
    model: PreTrainedModel, embeddings: Tensor, seen: Tensor | None, cache: DynamicCache, n_root: int | None
) -> tuple[Tensor, DynamicCache]:
    """One pass through the decoder on top of `cache`; positions count the real tokens only."""
    rows, width = embeddings.shape[:2]
    past = cache.get_seq_length()
    if seen is None:
        seen = torch.ones(rows, past + width, dtype=torch.bool, device=embeddings.device)
    positions = (seen.long().cumsum(1) - 1).clamp(min=0)[:, -width:]
    output = decoder_of(model)(
        inputs_embeds=embeddings,
        attention_mask=seen.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state, output.past_key_values


def row_key(prompt: Sequence[int], number: int) -> int:
    """64 bits that name a sample: its prompt's tokens and its number among the k."""
    digest = hashlib.blake2b(b",".join(str(t).encode() for t in prompt), digest_size=8)
    digest.update(f"#{number}".encode())
    return int.from_bytes(digest.digest(), "little")
