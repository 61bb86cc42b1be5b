"""`policypatch info | diff | verify | keygen | sign | stack`: a patch as a customer and a vendor handle it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from policypatch.commands.base import MODEL, Register, base_of, refuse_existing

PatchFolder = Annotated[Path, typer.Argument(help="a patch's folder")]
console = Console(soft_wrap=True, highlight=False)


def register(add: Register) -> None:
    """Add the commands."""
    for command in (info, diff, verify, keygen, sign, stack):
        add(command)


def info(patch: PatchFolder) -> None:
    """What a patch is, what it was measured to do, and who signed it."""
    from policypatch.patch import artifact, signature
    from policypatch.report.costs import size
    from policypatch.report.table import scorecard_table

    loaded = artifact.load(patch)
    manifest, signer = loaded.manifest, signature.signer(patch)
    told = {
        "patch": f"{manifest.name} {manifest.version}",
        "addresses": ", ".join(manifest.risks),
        "base": f"{manifest.base.id} ({manifest.base.revision})",
        "vectors": f"{manifest.length} x {manifest.width}, {size((patch / artifact.VECTORS).stat().st_size)}",
        "sha256": manifest.sha256,
        "made": manifest.created,
        "parents": ", ".join(f"{p.name} {p.version} ({p.sha256[:12]})" for p in manifest.parents) or "none",
        "signature": "none" if signer is None else f"names the key {signature.fingerprint(signer)}; not checked",
    }
    for name, value in told.items():
        console.print(f"{name:<10} {value}", markup=False)
    if manifest.scorecard:
        Console().print(scorecard_table(manifest.scorecard))


def diff(
    a: Annotated[Path, typer.Argument(help="a patch's folder")],
    b: Annotated[Path, typer.Argument(help="another one's")],
) -> None:
    """What differs between two patches: settings, figures, vectors."""
    from policypatch.patch import artifact

    first, second = artifact.load(a), artifact.load(b)
    for line in settings_that_differ(first.manifest.to_json(), second.manifest.to_json()):
        console.print(line, markup=False)
    for what, old, new in figures_that_differ(first.manifest.scorecard, second.manifest.scorecard):
        console.print(f"{what}: {old:.3g} -> {new:.3g}", markup=False)
    console.print(distance(first.vectors, second.vectors), markup=False)


def verify(
    patch: PatchFolder,
    key: Annotated[Path | None, typer.Option(help="public key that must have signed it")] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    allow_mismatch: Annotated[list[str] | None, typer.Option(help="digest of the base that may differ")] = None,
) -> None:
    """Check that a patch is whole, signed by whom you trust, and made for your base."""
    from policypatch.patch import artifact, signature

    loaded = artifact.load(patch, require_signature=key)
    console.print("✓ the vectors are those of the manifest", markup=False)
    if key is not None:
        console.print(f"✓ signed by {signature.fingerprint(signature.public_key(key))}", markup=False)
    elif (signer := signature.signer(patch)) is not None:
        console.print(f"– names the key {signature.fingerprint(signer)}: give --key to check it", markup=False)
    else:
        console.print("– not signed", markup=False)
    if model is None:
        console.print(f"– made for {loaded.manifest.base.id}: give --model to check yours", markup=False)
        return
    base = base_of(model)
    artifact.check_names(allow_mismatch or ())
    artifact.check_base(loaded.manifest, base.identity, allow_mismatch or (), str(patch), base.width)
    allowed = f", but for {', '.join(allow_mismatch)}" if allow_mismatch else ""
    console.print(f"✓ {model} is the base it was made for{allowed}", markup=False)
    odd = artifact.far_out(loaded.vectors, base.embedding)
    console.print(f"! {odd}" if odd else "✓ the vectors are as long as embeddings of the base", markup=False)
    if odd:
        raise typer.Exit(1)


def keygen(
    private: Annotated[Path, typer.Argument(help="file of the private key; the public one ends in .pub")],
) -> None:
    """Make a pair of keys to sign patches with."""
    from policypatch.patch import signature

    secret, public = signature.keygen(private)
    console.print(f"{secret} (keep it to yourself)\n{public} (give it to whom you give patches)", markup=False)
    console.print(f"fingerprint {signature.fingerprint(signature.public_key(public))}", markup=False)


def sign(patch: PatchFolder, key: Annotated[Path, typer.Option(help="private key, as keygen makes it")]) -> None:
    """Sign a patch as it is."""
    from policypatch.patch import artifact

    console.print(f"{artifact.sign(patch, key)}", markup=False)


def stack(
    patches: Annotated[list[Path], typer.Argument(help="folders of patches, in the order in which they stand")],
    out: Annotated[Path, typer.Option(help="folder of the stack")],
    name: Annotated[str | None, typer.Option(help="of the stack; the parts' names joined")] = None,
    version: Annotated[str, typer.Option(help="of the stack")] = "0.1.0",
    key: Annotated[Path | None, typer.Option(help="public key that must have signed every part")] = None,
    model: Annotated[
        str | None, typer.Option(help=f"base that they must be for, and whose context must have room; {MODEL}")
    ] = None,
) -> None:
    """Make one patch of several for the same base; measure it before you trust it."""
    from policypatch.patch import artifact, stacking

    refuse_existing(out)
    parts = [artifact.load(folder, require_signature=key) for folder in patches]
    base = None if model is None else base_of(model)
    if base is not None:
        artifact.check_base(parts[0].manifest, base.identity, (), str(patches[0]))
    made = stacking.stack(parts, name, version, None if base is None else base.context)
    artifact.save(made, out)
    lengths = " + ".join(str(part.manifest.length) for part in parts)
    console.print(f"{out}: {lengths} = {made.manifest.length} vectors, not measured yet", markup=False)


def settings_that_differ(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """A line for each key in which two manifests differ, or section that one of them has not.

    Not for what follows from the vectors, the measurement or the clock.
    """
    lines = []
    for key in sorted({*a, *b} - (set() if prefix else {"scorecard", "sha256", "created"})):
        old, new = a.get(key), b.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += settings_that_differ(old, new, f"{prefix}{key}.")
        elif old != new:
            shown = [textwrap.shorten(json.dumps(value), 60, placeholder=" ...") for value in (old, new)]
            lines.append(f"{prefix}{key}: {' -> '.join(shown)}")
    return lines


def figures_that_differ(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """Figures that both scorecards have of their patch and that are not the same."""
    key = ("arm", "risk", "split", "metric", "judge")
    other = {tuple(row.get(name) for name in key): row["value"] for row in b}
    for row in a:
        place = tuple(row.get(name) for name in key)
        if row.get("arm") not in ("base", "sft") and place in other and other[place] != row["value"]:
            yield " ".join(str(part) for part in place if part), row["value"], other[place]


def distance(a: Any, b: Any) -> str:
    """How far apart vectors (L, D) are: bit by bit the same, or the mean distance of each to its counterpart."""
    if a.shape != b.shape:
        return f"vectors: {tuple(a.shape)} -> {tuple(b.shape)}"
    if a.equal(b):
        return "vectors: the same"
    apart, length = (a - b).norm(dim=1).mean().item(), a.norm(dim=1).mean().item()
    cosine = (a * b).sum(1).div((a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)).mean().item()
    return f"vectors: {apart:.3g} apart on average, of a length of {length:.3g}; mean cosine {cosine:.3f}"
