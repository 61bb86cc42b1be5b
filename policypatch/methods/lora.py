"""Method `lora`: low-rank adapters on the base's linear layers, through the same pairs, stages and judges."""

from __future__ import annotations

from collections.abc import Sequence

from policypatch.errors import Number, PolicyPatchError
from policypatch.methods.method import Trained
from policypatch.model.arm import Arm
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.lora import LoRA, LoRABackbone, LoRASettings
from policypatch.model.sharded import is_sharded


class LoRAMethod(Trained):
    """See `Method` for what is not said here.

    Args:
        r: rank.
        scale: of the update, alpha / r.
        targets: names of the layers that get an adapter, or "all-linear" for all linear ones but the head.

    Raises:
        PolicyPatchError: a value that cannot be used.
    """

    def __init__(self, r: int, scale: float, targets: str | Sequence[str] = "all-linear", name: str = "lora"):
        super().__init__(name)
        Number(least=1, whole=True).check("lora.r", r)
        Number(above=0).check("lora.scale", scale)
        self.settings = LoRASettings(r, scale * r, targets if isinstance(targets, str) else tuple(targets))

    def check(self, base: Base) -> None:
        """Refuse layers that the base has not, or that no rank has whole."""
        if is_sharded(base.model):
            raise PolicyPatchError("method=lora changes layers that trainer.shard shares out: use trainer=ddp")
        if isinstance(self.settings.targets, str):
            return
        names = [name for name, _ in base.model.named_modules()]
        for target in self.settings.targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise PolicyPatchError(f"lora.targets names {target}, which {base.identity.id} has no layer of")

    def start(self, base: Base, seed: int, row_tokens: int) -> LoRABackbone:
        """The base with adapters that change nothing yet."""
        return LoRABackbone(LoRA(base, self.settings, seed), row_tokens)

    def arm(self, name: str, backbone: PrefixBackbone) -> Arm:
        """The adapters as they are now."""
        assert isinstance(backbone, LoRABackbone)
        return Arm(name, lora=backbone.lora.state())
