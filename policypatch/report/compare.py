"""Runs side by side: which differ in what, what each came to, and those that failed; as a page, CSV and Markdown.

compare([Path("outputs/length")], Path("outputs/length"))   # compare.html, .csv, .md, figures/
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from policypatch.files.atomic import write_text
from policypatch.report.compare_lines import Comparison, comparison
from policypatch.report.compare_text import RIVALS, against_patch, markdown, markdown_table, tables, tidy
from policypatch.report.records import find_records


def compare(folders: Sequence[Path], out: Path) -> Comparison:
    """Compare the runs at or below these folders; `out` gets `compare.html`, `.csv`, `.md` and `figures/`, as SVG.

    Raises:
        PolicyPatchError: a folder without runs, or a file that cannot be read.
    """
    from policypatch.report.compare_figures import panels
    from policypatch.report.compare_page import page
    from policypatch.report.drawing import alone, slug

    found = comparison(find_records(folders))
    write_text(out / "compare.csv", tidy(found))
    rivals = against_patch(found)
    write_text(out / "compare.md", written(found, rivals))
    drawn = panels(found)
    write_text(out / "compare.html", page(found, rivals, drawn, out))
    for panel in drawn:
        write_text(out / "figures" / f"{slug(panel.title)}.svg", alone(panel))
    return found


def say(found: Comparison, out: Path) -> None:
    """What was compared and where it stands, on the terminal."""
    Console(soft_wrap=True).print(f"{found.summary()}\n{out / 'compare.html'}", markup=False, highlight=False)


def written(found: Comparison, rivals: Sequence[Sequence[str]] = ()) -> str:
    """The comparison in Markdown, for a README or an issue; `rivals` as `against_patch` has them."""
    parts = [f"## {table.name}\n\n{markdown(table)}" for table in tables(found) if table.lines]
    if rivals:
        parts.insert(1, f"## Against the patch\n\n{RIVALS}\n\n{markdown_table(rivals)}")
    if found.failed:
        parts.append("## Failed\n\n" + "\n".join(f"- {r.folder.name}: {r.error}" for r in found.failed))
    if found.shared:
        parts.append(f"## The cache, all runs\n\n{found.shared}")
    return "\n\n".join(parts) + "\n"
