"""`policypatch export | import`: a patch for engines that know nothing of patches, and PEFT's back again."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from policypatch.commands.base import MODEL, Register, base_of, model_config, refuse_existing, tell_odd_norms
from policypatch.errors import PolicyPatchError
from policypatch.files.atomic import has_own, read_limited, write_text

if TYPE_CHECKING:
    from policypatch.export.words import Words

console = Console(soft_wrap=True, highlight=False)


class Target(StrEnum):
    """What a patch is exported to."""

    peft = "peft"
    tokens = "tokens"
    gguf = "gguf"
    embeds = "embeds"


def register(add: Register) -> None:
    """Add the commands."""
    add(export)
    add(import_, "import")


def export(
    patches: Annotated[list[Path], typer.Argument(help="patches' folders; several for tokens and gguf")],
    to: Annotated[Target, typer.Option(help="PEFT; words in a model folder or a GGUF file; vLLM's prompt_embeds")],
    out: Annotated[Path, typer.Option(help="folder (gguf: file) that is written")],
    model: Annotated[str | None, typer.Option(help=f"{MODEL}; for tokens and gguf")] = None,
    default: Annotated[str, typer.Option(help="stack that the chat template puts first, as tox+bias")] = "none",
    in_text: Annotated[bool, typer.Option("--in-text", help="tokens: put it before plain text as well")] = False,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="gguf: every tensor in float32")] = False,
    dtype: Annotated[
        str, typer.Option(help="of the model that is written (tokens) or that the server runs (embeds)")
    ] = "auto",
    key: Annotated[Path | None, typer.Option(help="public key that must have signed each patch")] = None,
    allow_mismatch: Annotated[list[str] | None, typer.Option(help="digest of the base that may differ")] = None,
) -> None:
    """Write a patch in a form that other software takes."""
    from policypatch.patch import artifact, signature

    refuse_existing(out)
    loaded = [artifact.load(folder, require_signature=key) for folder in patches]
    if to in (Target.peft, Target.embeds):
        if len(loaded) > 1:
            raise PolicyPatchError(f"--to {to} takes one patch: make one of them with policypatch stack")
        if to is Target.peft:
            from policypatch.patch.peft_layout import save_peft

            signed = _signature(patches[0])
            # As it is, also where another program laid it out: a signature covers its bytes.
            save_peft(loaded[0], out, read_limited(patches[0] / artifact.MANIFEST, artifact.MANIFEST_LIMIT))
            if signed:
                write_text(out / signature.SIGNATURE, signed)
        else:
            from policypatch.model.load import choose_dtype
            from policypatch.patch.prompt_embeds import save_embeds

            save_embeds(
                loaded[0], out, "bfloat16" if dtype == "auto" else str(choose_dtype(dtype)).removeprefix("torch.")
            )
        console.print(f"{out}", markup=False)
        return
    if model is None:
        raise PolicyPatchError(f"--to {to} makes a copy of the base: give it as --model")
    artifact.check_names(allow_mismatch or ())
    base = base_of(model, dtype)
    tell_odd_norms(loaded, base)
    if to is Target.tokens:
        from policypatch.export.model_folder import export_tokens

        words = export_tokens(base, loaded, out, default, in_text, allow_mismatch or ())
    else:
        from policypatch.export.gguf_file import export_gguf, gguf_of
        from policypatch.export.words import words_of

        for patch in loaded:
            artifact.check_base(patch.manifest, base.identity, allow_mismatch or (), patch.manifest.name)
        words = words_of(base, loaded)
        words.names(default)
        export_gguf(gguf_of(model_config(model)), words, out, default, dequantize)
    _say(words, out)


def _signature(folder: Path) -> str | None:
    """The folder's signature, where it has one.

    Raises:
        PolicyPatchError: it is a link that leads elsewhere, or no signature by its size.
    """
    from policypatch.patch.signature import LIMIT, SIGNATURE

    if not has_own(folder, SIGNATURE):
        return None
    return read_limited(folder / SIGNATURE, LIMIT).decode("utf-8", "replace")


def _say(words: Words, out: Path) -> None:
    from policypatch.export.words import UNLIKELY

    console.print(f"{out}", markup=False)
    for name, of in words.of.items():
        console.print(f"  {name}: {of[0]} to {of[-1]}", markup=False)
    if words.bos is not None:
        console.print(
            f"! the tokenizer puts {words.bos} before every text, and words stand before that: where no chat template "
            f"does it, write words, {words.bos} and text, with add_special_tokens=False (a GGUF file says so itself; "
            f"there write {words.bos} before a text without words, too)",
            markup=False,
        )
    if words.likeliest < UNLIKELY:
        console.print(f"  the model writes none of them: together at most {words.likeliest:.0e} likely", markup=False)
    else:
        console.print(
            f"! the model may write one, with up to {words.likeliest:.2g} probability: have your engine suppress them",
            markup=False,
        )


def import_(
    folder: Annotated[Path, typer.Argument(help="PEFT's folder of a prompt-tuning adapter")],
    out: Annotated[Path, typer.Option(help="folder of the patch")],
    model: Annotated[str | None, typer.Option(help=f"{MODEL}; where no manifest lies in the folder")] = None,
    name: Annotated[str | None, typer.Option(help="of the patch; the folder's by default")] = None,
    version: Annotated[str | None, typer.Option(help="of the patch; 0.1.0 by default")] = None,
    risk: Annotated[list[str] | None, typer.Option(help="that it addresses; may be given several times")] = None,
) -> None:
    """Make a patch of PEFT's prompt-tuning files: lossless for what `export` wrote, bound to --model for any other."""
    from policypatch.patch import artifact, signature
    from policypatch.patch.lineage import now, packages
    from policypatch.patch.manifest import Manifest
    from policypatch.patch.peft_layout import load_peft

    refuse_existing(out)
    vectors, base_name, manifest = load_peft(folder)
    written = None if manifest is None else read_limited(folder / artifact.MANIFEST, artifact.MANIFEST_LIMIT)
    signed = _signature(folder)
    if manifest is not None and model is not None:
        artifact.check_base(manifest, base_of(model).identity, (), str(folder))
    if manifest is None:
        if model is None:
            raise PolicyPatchError(
                f"{folder} names its base ({base_name}) but not which weights those are: give the base as --model"
            )
        base = base_of(model)
        if vectors.shape[1] != base.width:
            raise PolicyPatchError(f"{folder} has vectors of width {vectors.shape[1]} and {model} of {base.width}")
        manifest = Manifest(
            name=folder.resolve().name.lower(),
            version="0.1.0",
            risks=risk or ["unknown"],
            length=len(vectors),
            width=vectors.shape[1],
            base=base.identity,
            sha256=artifact.digest(vectors),
            created=now(),
            packages=packages(),
        )
    told: dict[str, Any] = {"name": name, "version": version, "risks": risk}
    told = {key: value for key, value in told.items() if value is not None}
    artifact.save(artifact.Patch(vectors, replace(manifest, **told)), out, None if told else written)
    if signed and not told:
        write_text(out / signature.SIGNATURE, signed)
    console.print(f"{out}: {manifest.name} {manifest.version}, {manifest.length} vectors", markup=False)
