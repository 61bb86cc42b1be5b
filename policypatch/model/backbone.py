"""The prefix-embedding backbone that both training stages share: a frozen causal LM behind a trainable patch.

The patch is P vectors of the embedding width, fed as input embeddings before everything else. It takes positions
0..P-1 and the first prompt token stands at P. The forward pass computes each node of the batch's tree once
(`policypatch.model.tree`), and vocabulary logits only where a completion token is predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policypatch.errors import PolicyPatchError
from policypatch.model.head import finish_logits, token_divergence, token_logprobs
from policypatch.model.over_root import can_stand_over_root, keep_apart
from policypatch.model.packed import packed_states
from policypatch.model.parts import context_of, sliding_window
from policypatch.model.sharded import is_sharded
from policypatch.model.tree import Cost, Item, Tree, build_tree

log = logging.getLogger(__name__)

SPLIT = 64  # tokens: a GPU waits to be asked for the attention of root and rows, as for a pass of its own before
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.125  # of `difference`, in float32 and in half precision


class PrefixBackbone(nn.Module):
    """A frozen LM with a trainable patch in front.

    Args:
        model: a transformers causal LM; its parameters are frozen here and it stays in eval mode.
        vectors: (P, D) the patch's starting values; P = 0 gives the base itself.
        max_row_tokens: see `build_tree`.

    Attributes:
        patch: (P, D) float32, what is trained.
        recompute: a layer's activations are computed again in the backward pass rather than kept. With adapters that
            are switched (`policypatch.model.lora`) the switch has to stay as it was until then (`at_work`).
        compiled: layers run as torch.compile makes them.
        head_logits: how many are computed at once, see `policypatch.model.head`; None for what suits the device.
        anchor: (A, D) what stands before that which the patched base is compared with; None: nothing, it is the base.
        reference: (R, D) what DPO's reference has in the patch's place; None where it is no patch.
    """

    patch: nn.Parameter

    def __init__(self, model: PreTrainedModel, vectors: Tensor, max_row_tokens: int = 512):
        super().__init__()
        width = model.get_input_embeddings().weight.shape[1]
        if vectors.dim() != 2 or vectors.shape[1] != width:
            raise PolicyPatchError(
                f"the patch has shape {tuple(vectors.shape)} but this base takes vectors of width {width}"
            )
        # Kept out of the module tree: a frozen model has no business in state_dict, checkpoints or optimisers.
        self._frozen = [freeze(model)]
        self.patch = nn.Parameter(vectors.detach().clone().float())
        self.max_row_tokens = max_row_tokens
        self.recompute = self.compiled = False
        self.head_logits: int | None = None
        self.anchor: Tensor | None = None
        self.reference: Tensor | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The frozen LM."""
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixBackbone:
        # .to(device) must carry the frozen model along although it is not a registered submodule; its dtype is
        # its own business, so only a move is passed on.
        probe = fn(torch.empty(0, device=self.patch.device))
        super()._apply(fn, recurse)
        placed = is_sharded(self.model) or getattr(self.model, "hf_device_map", None) is not None
        if probe.device != self.model.device and not placed:
            self.model.to(probe.device)
        return self

    def at_work(self) -> AbstractContextManager[None]:
        """For as long as many forwards follow each other: whatever need not be done for each of them is done once."""
        return nullcontext()

    def begin(self, step: int | None) -> None:
        """A training step begins, None for what is none: a backbone that changes from step to step does so here."""

    def reference_logprobs(self, tree: Tree) -> Tensor | None:
        """(S,) the reference's summed log-probability of each completion, where it is not the same at every step."""
        return None

    def tree(self, items: list[Item]) -> Tree:
        """Pack items for this backbone, on its device."""
        count, width = self.patch.shape
        cost = Cost(width, count, can_stand_over_root(self.model), SPLIT if self.model.device.type == "cuda" else 0)
        return build_tree(items, self.max_row_tokens, cost).to(self.model.device)

    def completion_logprobs(self, tree: Tree) -> Tensor:
        """Log-probability of each completion token: (N,) float32, in the order of `tree.targets`."""
        return token_logprobs(self.model, self.hidden(tree), tree.targets, self.head_logits)

    def sequence_logprobs(self, tree: Tree) -> Tensor:
        """Summed log-probability of each completion: (S,) float32."""
        return sum_by_sequence(self.completion_logprobs(tree), tree)

    def logits(self, tree: Tree) -> Tensor:
        """Logits that predict each completion token: (N, V) float32. For tests and short batches."""
        return finish_logits(self.model, self.model.get_output_embeddings()(self.hidden(tree))).float()

    def completion_logprobs_and_kl(self, tree: Tree, base_tree: Tree, anchored: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each completion token: (N,); mean KL(base || patched) per token of some completions: (K,).

        Args:
            tree: the batch.
            base_tree: the same prompts with the K anchored completions alone, which the base reads without the patch.
            anchored: (K,) which of the batch's completions these are, ascending.
        """
        states = self.hidden(tree)
        kl = self._divergence(states[torch.isin(tree.sequence, anchored)], base_tree)
        return token_logprobs(self.model, states, tree.targets, self.head_logits), kl

    def divergence(self, tree: Tree, base_tree: Tree | None = None) -> Tensor:
        """Mean KL(base || patched) per token of each completion: (S,) float32, in nats.

        `base_tree` holds the same completions behind what the base reads before them, where that differs.
        """
        return self._divergence(self.hidden(tree), base_tree or tree)

    def _divergence(self, states: Tensor, base_tree: Tree) -> Tensor:
        """The same from the patched base's states (N, D) at what `base_tree` holds."""
        with torch.no_grad():
            base_states = self.base_hidden(base_tree)
        kl = token_divergence(self.model, states, base_states, self.head_logits)
        return sum_by_sequence(kl, base_tree) / torch.bincount(base_tree.sequence, minlength=base_tree.sequences)

    def hidden(self, tree: Tree) -> Tensor:
        """Last hidden states at the positions that predict a completion token: (N, D)."""
        return self._hidden(tree, self.patch)

    def base_hidden(self, tree: Tree) -> Tensor:
        """The same of the base behind the anchor alone."""
        return self._hidden(tree, self.patch[:0] if self.anchor is None else self.anchor.to(self.patch.device))

    def _hidden(self, tree: Tree, patch: Tensor) -> Tensor:
        root = self._root_embeddings(tree, patch)
        n_root = root.shape[0]
        embeddings = self.model.get_input_embeddings()(tree.ids)
        positions = tree.offsets + n_root
        self._check_length(int(positions.max()) + 1)
        if n_root == 0 and bool((tree.source_col < 0).any()):
            raise PolicyPatchError(
                "a prompt has no tokens and no patch stands before it: nothing predicts its completion"
            )
        wanted = tree.source_row, tree.source_col
        return packed_states(
            self.model, root, embeddings, positions, tree.allowed, wanted, self.recompute, self.compiled
        )

    def _check_length(self, length: int) -> None:
        # The packed mask is one for all layers, so it cannot also cut off what a sliding layer has forgotten.
        config = self.model.config
        limits = {
            "sliding window": sliding_window(self.model),
            "context": context_of(config),
        }
        for name, limit in limits.items():
            if limit is not None and length > limit:
                raise PolicyPatchError(
                    f"a training sequence of {length} tokens (patch included) exceeds the {name} of {limit} of this "
                    f"{type(self.model).__name__}: shorten data.max_prompt_tokens or data.max_completion_tokens"
                )

    def _root_embeddings(self, tree: Tree, patch: Tensor) -> Tensor:
        """(P + C, D): the patch and the common prefix of the prompts."""
        tokens = self.model.get_input_embeddings()(tree.root)
        return torch.cat([patch.to(tokens.dtype), tokens])


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Take the gradient from every weight of the base; those of adapters in it (`policypatch.model.lora`) are kept."""
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            parameter.requires_grad_(False)
    return model.eval()


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is one of peft's LoRA matrices."""
    return ".lora_A." in name or ".lora_B." in name


def sum_by_sequence(values: Tensor, tree: Tree) -> Tensor:
    """Sum per-token values (N,) over each completion: (S,)."""
    return torch.zeros(tree.sequences, dtype=values.dtype, device=values.device).index_add(0, tree.sequence, values)


def plain_logits(model: PreTrainedModel, patch: Tensor, prompt: list[int], completion: list[int]) -> Tensor:
    """The same logits the obvious way: one concatenated sequence, no sharing. (len(completion), V) float32.

    This is the definition that the tree is held against, in the tests and by `check_tree`.
    """
    ids = torch.tensor([*prompt, *completion], device=model.device)
    tokens = model.get_input_embeddings()(ids)
    embeddings = torch.cat([patch.to(tokens.dtype), tokens])[None]
    n = embeddings.shape[1]
    output = model(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(1, n, dtype=torch.long, device=model.device),
        position_ids=torch.arange(n, device=model.device)[None],
        use_cache=False,
    )
    return output.logits[0, n - len(completion) - 1 : n - 1].float()


def difference(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    """How far logits (N, V) are apart that should be the same, as a share of their spread.

    In float32 the largest difference. In half precision single logits of a right computation are far apart (0.3 of
    Gemma 3 270M on a GPU, whose kernels add in another order for another shape), so their root mean square: a mask or
    positions that are ignored move all of them (0.25 of an MPT).
    """
    gap = (ours - theirs).float()
    off = gap.abs().max() if dtype == torch.float32 else gap.square().mean().sqrt()
    return (off / theirs.float().std().clamp(min=1e-6)).item()


def tolerance_of(dtype: torch.dtype) -> float:
    """How large a `difference` rounding explains."""
    return TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE


@torch.no_grad()
def check_tree(model: PreTrainedModel) -> None:
    """Refuse an architecture on which the packed tree does not reproduce plain concatenation.

    A model that ignores position ids or an explicit mask (ALiBi, state-space layers, ...) would train to silently
    wrong numbers. Five tokens through both ways cost milliseconds and rule that out. One on whose attention alone it
    fails is read with a root for every row.

    Raises:
        PolicyPatchError: naming the architecture.
    """
    try:
        _check_tree(model)
    except PolicyPatchError as error:
        if not can_stand_over_root(model):
            raise
        log.info("every row of a batch gets a root of its own, as the model's attention cannot be exchanged: %s", error)
        keep_apart(model)
        _check_tree(model)


def _check_tree(model: PreTrainedModel) -> None:
    width = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    scale = model.get_input_embeddings().weight.float().std().item()
    patch = torch.randn(3, width, generator=generator).to(model.device) * scale
    items = [Item((5, 6, 7), ((8, 9), (10, 11, 12))), Item((5, 13), ((14, 15), (16,)))]
    kind = type(model).__name__
    try:
        for row_tokens in (512, 8):  # one packed row, and several rows over a shared root
            shared = PrefixBackbone(model, patch).logits(build_tree(items, row_tokens).to(model.device))
            plain = torch.cat([plain_logits(model, patch, [*i.prompt], [*c]) for i in items for c in i.completions])
            off = difference(shared, plain, model.dtype)
            if not off <= tolerance_of(model.dtype):
                raise PolicyPatchError(
                    f"{kind} is not supported: with a shared prefix its logits differ by {off:.1e} of their spread "
                    "from those of plain concatenation (it ignores position ids or an explicit attention mask)"
                )
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise PolicyPatchError(
            f"{kind} is not supported: its forward does not take explicit positions and a 4-D mask ({error})"
        ) from error
