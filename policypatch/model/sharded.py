"""A frozen base of which every rank holds a share (FSDP2): for bases that do not fit one device.

A layer's weights are collected from all ranks while it runs, forward or backward, so all have to run the model as often
as each other, whatever they run it on. They do not by themselves: one has longer prompts to continue, or a batch with
texts beside it. Hence a rank that has come to a place where it waits for the others takes part in their forwards with a
token of its own until they wait as well (`Lockstep.wait`), and before the backward pass those that had fewer forwards
make up for them (`Lockstep.levelled`).

FSDP2's own `fully_shard`, not Lightning's strategies for it: a base is decoded from before and after the stages, where
no trainer is, and to Lightning, which sees the patch alone, a stage is DDP's.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policypatch import ranks
from policypatch.errors import PolicyPatchError
from policypatch.model.parts import decoder_of, layers_of

_steps: WeakKeyDictionary[PreTrainedModel, Lockstep] = WeakKeyDictionary()


def shard(model: PreTrainedModel, device: str) -> None:
    """Leave this rank its share of the layers' weights, on the device; embeddings and head it has whole. `keep_step`
    comes before the first forward.

    Args:
        model: frozen, whole, anywhere.
        device: "cuda" or "cpu".

    Raises:
        PolicyPatchError: the architecture's layers are not known.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # a second and more to import

    layers = layers_of(model)
    if not layers:
        raise PolicyPatchError(f"trainer.shard: {type(model).__name__} has no layers that are known: set it to false")
    mesh = init_device_mesh(device, (ranks.size(),))
    shared = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    decoder = decoder_of(model)
    whole = {parameter for parameter in decoder.parameters() if id(parameter) not in shared}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    model.to(device)


def keep_step(model: PreTrainedModel) -> None:
    """Have all ranks, each of which has its share by now, run the model as often as each other from here on."""
    _steps[model] = Lockstep(decoder_of(model), model.get_input_embeddings().weight)


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether every rank holds a share of it."""
    return model in _steps


def levelled(model: PreTrainedModel, loss: Tensor, vectors: Tensor) -> Tensor:
    """A loss whose backward pass runs the model as often as every other rank's.

    Args:
        model: the frozen LM; of one that is not sharded nothing is done.
        loss: what is derived.
        vectors: (P, D) something that the gradient is wanted of.
    """
    lockstep = _steps.get(model)
    return loss if lockstep is None else lockstep.levelled(loss, vectors)


class Lockstep:
    """Has all ranks run a sharded model as often as each other."""

    def __init__(self, decoder: nn.Module, embedding: Tensor):
        self._decoder, self._embedding = decoder, embedding
        self._helping = False
        self._to_derive = 0  # forwards since the last backward pass that it will go through
        decoder.register_forward_pre_hook(self._announce, prepend=True, with_kwargs=True)
        decoder.register_forward_hook(self._count)
        ranks.meanwhile(self.wait)

    def wait(self) -> None:
        """Take part in the others' forwards until all ranks are here."""
        while ranks.any_of(False):
            self._helping = True
            try:
                with torch.no_grad():
                    self._run(self._embedding[:1])
            finally:
                self._helping = False

    def levelled(self, loss: Tensor, vectors: Tensor) -> Tensor:
        """See the function of this name."""
        most = max(ranks.gather(self._to_derive))
        missing = most - self._to_derive
        for _ in range(missing):
            loss = loss + 0 * self._run(vectors[:1].to(self._embedding.dtype)).sum()
        ranks.gather(None)  # not before those that make up for something are done
        self._to_derive = 0
        return loss

    def _run(self, vectors: Tensor) -> Tensor:
        position = torch.zeros(1, 1, dtype=torch.long, device=vectors.device)
        states: Tensor = self._decoder(
            inputs_embeds=vectors[None], position_ids=position, use_cache=False
        ).last_hidden_state
        return states

    def _announce(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not self._helping:
            ranks.any_of(True)
        # FSDP gives a layer's weights back once the gradient of its input is there: without one, as where no patch
        # stands in front, the first layer's would stay, and would not be collected again as on the other ranks.
        embeddings = named["inputs_embeds"]
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            named = named | {"inputs_embeds": embeddings.detach().requires_grad_()}
        return given, named

    def _count(self, module: nn.Module, given: Any, output: Any) -> None:
        self._to_derive += bool(output.last_hidden_state.requires_grad)
