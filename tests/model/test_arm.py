"""Arms: what is asked in the base's place, and that each has an identity of its own."""

import pytest
import torch

from policypatch.model.arm import Arm
from policypatch.model.backbone import PrefixBackbone
from policypatch.model.base import Base
from policypatch.model.form import CHAT, PLAIN, Form, Guidance
from policypatch.model.lora import LoRA, LoRASettings

GUIDED = Guidance("Be kind.", (("Who?", "Nobody."),), "Kindly:\n")


def vectors(base: Base, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, base.width, generator=torch.Generator().manual_seed(seed)) * base.embedding.std()


def test_guidance_stands_before_the_prompt_of_either_form(tiny_base: Base):
    assert GUIDED.around(CHAT) == Form(True, "Be kind.", (("Who?", "Nobody."),))
    assert GUIDED.around(PLAIN) == Form(before="Kindly:\n")
    assert tiny_base.encode_prompt("Text", GUIDED.around(PLAIN)) == tiny_base.encode_prompt("Kindly:\nText")


def test_a_prompts_own_form_is_kept_within_guidance():
    own = Form(True, "Mine.", (("A", "B"),))
    assert GUIDED.around(own) == Form(True, "Mine.", (("Who?", "Nobody."), ("A", "B")))
    assert Guidance().around(own) == own


def test_no_two_arms_share_an_identity(tiny_base: Base):
    lora = LoRA(tiny_base, LoRASettings(1, 2.0), seed=0)
    arms = [
        Arm("base"),
        Arm("patch", vectors(tiny_base)),
        Arm("patch", vectors(tiny_base, 1)),
        Arm("prompt", guidance=GUIDED),
        Arm("lora", lora=lora.state()),
    ]
    identities = [arm.identity(tiny_base) for arm in arms]
    lora.remove()
    assert all(identities.count(identity) == 1 for identity in identities)
    assert [arm.is_base for arm in arms] == [True, False, False, False, False]
    assert Arm("another name").identity(tiny_base) == identities[0]


@pytest.mark.parametrize("best_of", [1, 4])
def test_what_chooses_among_samples_has_no_likelihood(best_of: int):
    arm = Arm("teacher", best_of=best_of, chosen_by=("one",))
    assert arm.has_likelihood == (best_of == 1) and arm.is_base == (best_of == 1)


def test_another_model_is_asked_in_the_bases_place(tiny_base: Base):
    other = Base(tiny_base.model, tiny_base.tokenizer, tiny_base.identity)
    with Arm("teacher", other=other).on(tiny_base) as asked:
        assert asked is other
    with Arm("base").on(tiny_base) as asked:
        assert asked is tiny_base


def test_adapters_work_within_the_block_and_not_after_it(tiny_base: Base):
    lora = LoRA(tiny_base, LoRASettings(2, 4.0), seed=0)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.add_(0.1)
    ids = torch.tensor([[5, 6, 7]])
    off = tiny_base.model(ids).logits
    arm = Arm("lora", lora=lora.state())
    with arm.on(tiny_base) as asked:
        assert not torch.allclose(asked.model(ids).logits, off, atol=1e-3)
    assert torch.equal(tiny_base.model(ids).logits, off)
    lora.remove()


def test_the_backbone_of_a_patch_is_the_patched_base(tiny_base: Base):
    arm = Arm("patch", vectors(tiny_base))
    assert torch.equal(arm.backbone(tiny_base, 64).patch, arm.vectors)
    alone = Arm("base").backbone(tiny_base, 64)
    assert isinstance(alone, PrefixBackbone) and alone.patch.shape == (0, tiny_base.width)
