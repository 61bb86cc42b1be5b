"""Which figures suit what is compared, and what they say."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import yaml
from test_compare import write

from policypatch.report.compare import compare
from policypatch.report.compare_figures import _front, panels
from policypatch.report.compare_lines import comparison
from policypatch.report.drawing import slug
from policypatch.report.records import find_records


def titles(folder: Path) -> list[str]:
    return [panel.title for panel in panels(comparison(find_records([folder])))]


def test_a_number_is_an_axis(sweep: Path):
    drawn = panels(comparison(find_records([sweep])))
    assert [panel.title for panel in drawn] == [
        "toxic rate (rtp, svm)",
        "toxic rate (rtp, bilstm*)",
        "median PPL (rtp, g)",
        "frontier: lower left is best",
    ]
    assert "by patch.length: patch 1: 0.31, 10: 0.21, 50: 0.11" in drawn[0].svg


def test_two_numbers_are_an_axis_each_and_neither_figure_hides_the_other(tmp_path: Path):
    for i, length in enumerate((1, 10, 50)):
        for k, beta in enumerate((0.1, 0.2, 0.4)):
            write(tmp_path / f"{length},{beta}", {"patch.length": length, "dpo.beta": beta}, 0.1 * i + 0.01 * k)
    drawn = [panel.title for panel in panels(compare([tmp_path], tmp_path / "out"))]
    assert drawn[0] == "toxic rate (rtp, svm), by beta" and drawn[3] == "toxic rate (rtp, svm), by length"
    assert len(list((tmp_path / "out" / "figures").glob("*.svg"))) == len(drawn) == 2 * 3 + 1


def test_runs_of_a_search_are_points_and_no_curves(tmp_path: Path):
    for i, (beta, rate) in enumerate(((0.1, 0.003), (0.2, 0.03), (0.4, 0.02))):
        run = write(tmp_path / str(i), {"dpo.beta": beta, "dpo.lr": rate}, 0.1 * i, ppl=50 - i)
        (run / ".hydra").mkdir()
        (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"dpo.beta={beta}", f"dpo.lr={rate}"]))
    drawn = panels(comparison(find_records([tmp_path])))
    assert any("by dpo.lr: runs 0.003: 0, 0.02: 0.2, 0.03: 0.1" in panel.svg for panel in drawn)
    assert not any("mathdefault" in panel.svg for panel in drawn)  # how matplotlib writes a power of ten
    assert drawn[-1].title.startswith("frontier") and "no other beats" in drawn[-1].note


def test_methods_are_bars_sizes_and_times(tmp_path: Path):
    for name, arm, value, size in (
        ("none", "base", 0.4, 0),
        ("patch", "patch", 0.2, 28800),
        ("lora", "lora", 0.1, 300_000),
    ):
        write(tmp_path / name, {"method.name": name}, value, arm, size=size)
    assert titles(tmp_path) == [
        "toxic rate (rtp, svm)",
        "toxic rate (rtp, bilstm*)",
        "median PPL (rtp, g)",
        "risk against size",
        "time for each further token (1 prompt of 32 tokens)",
    ]


def test_seeds_alone_are_bars_with_the_intervals_of_each(tmp_path: Path):
    for seed in (0, 1, 2):
        write(tmp_path / f"seed={seed}", {"seed": seed}, 0.1 + 0.1 * seed)
    found = comparison(find_records([tmp_path]))
    drawn = panels(found)
    assert drawn[0].title == "toxic rate (rtp, svm)" and "seed 0 0.1, seed 1 0.2, seed 2 0.3" in drawn[0].svg
    assert not any("frontier" in panel.title for panel in drawn)
    compare([tmp_path], tmp_path)
    assert "whiskers are 95 % intervals over prompts" in (tmp_path / "compare.html").read_text()


def test_one_run_has_a_table_and_no_figures(tmp_path: Path):
    write(tmp_path / "only", {}, 0.2)
    assert titles(tmp_path) == []
    found = compare([tmp_path / "only"], tmp_path)
    assert found.keys == [] and len(found.lines) == 2


def test_a_front_is_what_no_other_point_beats_in_both():
    assert _front([(1, 3), (2, 2), (3, 1), (3, 3), (2, 2.5), (1, 3)]) == [(1, 3), (2, 2), (3, 1)]


def test_of_several_models_no_base_is_drawn_and_all_are_listed(tmp_path: Path):
    for model in ("small", "large"):
        for seed in (0, 1):
            write(tmp_path / f"{model},{seed}", {"model.name": model, "seed": seed}, 0.2)
    found = comparison(find_records([tmp_path]))
    assert found.keys == ["model.name", "seed"]
    assert [line.values.get("model.name") for line in found.lines if not line.records] == ["large", "small"]
    assert "dashed: base" not in "".join(panel.svg for panel in panels(found))


def test_every_figure_is_a_file_of_its_own(sweep: Path, tmp_path: Path):
    found = compare([sweep], tmp_path / "out")
    files = sorted((tmp_path / "out" / "figures").glob("*.svg"))
    assert len(files) == len(panels(found)) > 1
    for path in files:
        root = ET.parse(path).getroot()
        assert root.tag.endswith("svg") and root[0].get("fill") == "white"
        assert root[1].text and slug(root[1].text) == path.stem
        # Every colour of the page's falls back on one of its own.
        assert not re.search(r"var\(--[\w-]+\)", path.read_text())
