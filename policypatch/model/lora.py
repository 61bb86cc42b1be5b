"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a frozen base, by peft: what a patch is compared with.

The adapters are injected into the base in place and are off unless they are asked for, so that base and LoRA share one
copy of the weights. The backbone below trains them through the same tree, stages and losses as a patch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import atomic_folder
from policypatch.model.backbone import PrefixBackbone, is_adapter
from policypatch.model.base import Base
from policypatch.model.tree import Tree

if TYPE_CHECKING:  # peft takes seconds to import, and a run without LoRA has no use for it
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"  # peft's name for the only adapter of a model
PREFIX = "base_model.model."  # what peft's files write before the names of a model's modules


@dataclass(frozen=True)
class LoRASettings:
    """What the adapters are. Every field is a config key of `lora`.

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r.
        targets: names of the linear layers that get one, or "all-linear" for all but the head.
    """

    r: int
    alpha: float
    targets: str | tuple[str, ...] = "all-linear"


class LoRA:
    """Adapters in a base's linear layers, off at first.

    Args:
        base: the frozen base; its model is changed in place until `remove`.
        settings: rank and so on.
        seed: of the adapters' starting values; at the start they change nothing (B is 0).

    Attributes:
        layers: the layers that have an adapter, by name.
        parameters: the trainable tensors, by name: A (r, in) and B (out, r) of every layer.

    Raises:
        PolicyPatchError: the base has adapters already, or none of the layers that `targets` names.
    """

    def __init__(self, base: Base, settings: LoRASettings, seed: int):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        if any(isinstance(module, LoraLayer) for module in base.model.modules()):
            raise PolicyPatchError(f"{base.identity.id} has LoRA adapters already: remove them first")
        targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
        self.config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            target_modules=targets,
            task_type="CAUSAL_LM",
            base_model_name_or_path=base.identity.id,
        )
        self.base = base
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(self.config, base.model)
            except ValueError as error:
                raise PolicyPatchError(f"lora.targets is {settings.targets!r}: {error}") from error
        self.model: PreTrainedModel = base.model.eval()
        self.layers: dict[str, LoraLayer] = {
            name: m for name, m in base.model.named_modules() if isinstance(m, LoraLayer)
        }
        self.parameters = {name: p for name, p in base.model.named_parameters() if is_adapter(name)}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()  # peft takes the base's dtype; what is trained stays float32
        self._switch(False)

    @contextmanager
    def enabled(self, on: bool = True) -> Iterator[None]:
        """The adapters are on, or off, for as long as the block lasts.

        A switch takes milliseconds (peft walks all layers): what computes many times in a row is put into one block.
        """
        before = not next(iter(self.layers.values())).disable_adapters  # all layers are switched together
        if on == before:
            yield
            return
        self._switch(on)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, on: bool) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(on)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)  # peft takes it away from what is off, also from a graph made before

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The adapters added to the weights, which are what they were bit by bit afterwards."""
        # On the CPU: a second copy of the weights may have no room beside the first.
        kept = {name: layer.get_base_layer().weight.detach().cpu().clone() for name, layer in self.layers.items()}
        with self.enabled():
            for layer in self.layers.values():
                layer.merge()
            try:
                yield
            finally:
                for name, layer in self.layers.items():
                    layer.unmerge()
                    layer.get_base_layer().weight.data.copy_(kept[name])  # subtracting leaves rounding behind

    @contextmanager
    def cast(self) -> Iterator[None]:
        """The adapters in the base's precision, which saves the casts between it and float32 in every layer."""
        kept = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = kept[name].to(self.model.dtype)
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = kept[name]

    def remove(self) -> None:
        """Leave the base as it was before."""
        self._place({name: layer.get_base_layer() for name, layer in self.layers.items()})

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """The base as it was before for as long as the block lasts: what is off costs a little time all the same."""
        self.remove()
        try:
            yield
        finally:
            self._place(self.layers)

    def _place(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            parent, _, own = name.rpartition(".")
            setattr(self.model.get_submodule(parent), own, module)

    def state(self) -> LoRAState:
        """The adapters' values as they are now."""
        return LoRAState(self, {name: p.detach().clone() for name, p in self.parameters.items()})


@dataclass(frozen=True, eq=False)
class LoRAState:
    """Values of a base's adapters at one time: what training came to after a stage.

    Attributes:
        lora: the adapters.
        tensors: float32 values by name.
    """

    lora: LoRA
    tensors: Mapping[str, Tensor]

    @cached_property
    def digest(self) -> str:
        """sha256 in hex of names, values and scale."""
        h = hashlib.sha256(str(self.lora.config.lora_alpha).encode())
        for name, tensor in sorted(self.tensors.items()):
            h.update(f"{name} {tuple(tensor.shape)} ".encode())
            h.update(tensor.cpu().contiguous().numpy().astype("<f4").tobytes())
        return h.hexdigest()

    @property
    def base(self) -> Base:
        """The base under an identity that tells it from the plain one, by these values."""
        plain = self.lora.base
        weights = hashlib.sha256(f"{plain.identity.weights} {self.digest}".encode()).hexdigest()
        return replace(plain, identity=replace(plain.identity, weights=weights))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The base computes with these values for as long as the block lasts."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                self.lora.parameters[name].copy_(tensor)
        with self.lora.enabled():
            yield

    def save(self, folder: Path) -> Path:
        """Write `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`."""
        tensors = {
            PREFIX + name.replace(f".{ADAPTER}", ""): tensor.cpu().contiguous() for name, tensor in self.tensors.items()
        }
        with atomic_folder(folder) as temporary:
            save_file(tensors, temporary / "adapter_model.safetensors")
            self.lora.config.save_pretrained(str(temporary))
        return folder


class LoRABackbone(PrefixBackbone):
    """The base with trainable adapters, in place of trainable vectors in front; the rest is `PrefixBackbone`'s.

    Args:
        lora: the adapters.
        max_row_tokens: see `build_tree`.
    """

    def __init__(self, lora: LoRA, max_row_tokens: int = 512):
        width = lora.model.get_input_embeddings().weight.shape[1]
        super().__init__(lora.model, torch.zeros(0, width, device=lora.model.device), max_row_tokens)
        self.patch.requires_grad_(False)
        self._lora = [lora]
        # ParameterDict takes no dots in names.
        self.adapters = nn.ParameterDict({name.replace(".", "/"): p for name, p in lora.parameters.items()})

    @property
    def lora(self) -> LoRA:
        """The adapters."""
        return self._lora[0]

    def at_work(self) -> AbstractContextManager[None]:
        """The adapters stay on between forwards."""
        return self.lora.enabled()

    def hidden(self, tree: Tree) -> Tensor:
        """With the adapters on."""
        with self.lora.enabled():
            return super().hidden(tree)

    def base_hidden(self, tree: Tree) -> Tensor:
        """With the adapters off."""
        with self.lora.enabled(False):
            return super().base_hidden(tree)
