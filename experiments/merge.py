"""A base with a LoRA run's adapters merged into its weights: a version of the base for `policypatch rebase` to go to.

    python run.py risk=toxicity method=lora hydra.run.dir=outputs/tuned
    python experiments/merge.py outputs/tuned --out outputs/merged
    policypatch rebase PATCH --from smollm2_135m --to outputs/merged --out outputs/carried

Writes a model folder like any other (weights, generation config, tokenizer), by PEFT's own `merge_and_unload`, and
loads it again to see that it computes what base and adapters compute together.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from omegaconf import OmegaConf
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from policypatch.commands.base import refuse_existing
from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import atomic_folder
from policypatch.model.load import NO_CODE, load_base

ADAPTER = "peft"  # a run's folder of adapters
PROBE = [5, 6, 7, 8, 9, 10]  # tokens that the folder is tried on
DTYPES = ("float32", "bfloat16", "float16")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="folder of a finished run of method=lora")],
    out: Annotated[Path, typer.Option(help="folder of the model")],
    dtype: Annotated[str, typer.Option(help="in which weights are added up and written")] = "float32",
) -> None:
    """Write the base of a LoRA run with its adapters merged."""
    refuse_existing(out)
    if not (run / ADAPTER / "adapter_model.safetensors").is_file():
        raise PolicyPatchError(f"{run} has no {ADAPTER}/adapter_model.safetensors: give a finished run of method=lora")
    if dtype not in DTYPES:
        raise PolicyPatchError(f"--dtype is {dtype!r}: choose from {', '.join(DTYPES)}")
    config = OmegaConf.load(run / "config.yaml").model
    if config.quantize is not None:
        raise PolicyPatchError(f"{run} trained on a base in {config.quantize}, which nothing can be merged into")
    base = load_base(OmegaConf.merge(config, {"dtype": dtype, "device": "cpu"}))
    adapted = PeftModel.from_pretrained(base.model, str(run / ADAPTER)).eval()
    before = _logits(adapted)
    merged = adapted.merge_and_unload()
    with atomic_folder(out) as temporary:
        merged.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
        again = AutoModelForCausalLM.from_pretrained(temporary, dtype=merged.dtype, **NO_CODE).eval()
        worst = ((_logits(again) - before).abs().max() / before.std()).item()
        if not worst <= (1e-3 if dtype == "float32" else 0.2):
            raise PolicyPatchError(
                f"{run}: merged, the logits differ by {worst:.1e} of their spread: try --dtype float32"
            )
    Console(soft_wrap=True).print(f"{out}: {base.identity.id} with the adapters of {run}", markup=False)


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel) -> Tensor:
    """(T, V) over the probe."""
    return model(torch.tensor([PROBE])).logits[0].float()


if __name__ == "__main__":
    try:
        app()
    except PolicyPatchError as error:
        sys.exit(f"error: {error}")
