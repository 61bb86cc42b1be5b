"""The comparison in a real browser: it sorts, its script runs and no other may, nothing sticks out.

Set REPORT_SHOTS to a folder to keep the screenshots.
"""

import json
import os
from pathlib import Path

import pytest
from browser import IN_A_BROWSER, chromium, is_whole, measured
from test_compare import write

from policypatch.report.compare import compare
from policypatch.report.records import FAILED

pytestmark = IN_A_BROWSER

# Presses the heading of the first table's column of lengths twice.
SORTED = """
  const table = page.querySelector("table.compare");
  const head = [...table.tHead.rows[0].cells].find((cell) => cell.textContent.includes("length"));
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[head.cellIndex].textContent.trim());
  const before = column();
  head.querySelector("button").click();
  const up = column(), upwards = head.getAttribute("aria-sort");
  head.querySelector("button").click();
  return {
    before, up, upwards, down: column(), downwards: head.getAttribute("aria-sort"),
    hacked: page.defaultView.hacked || false, figures: page.querySelectorAll("figure").length,
    text: page.body.innerText,
  };
"""
# Presses the first heading of every table.
PRESSED = """
  return {sorted: [...page.querySelectorAll("table.compare")].map((table) => {
    const head = table.tHead.rows[0].cells[0], rows = table.tBodies[0].rows.length;
    head.querySelector("button").click();
    return [head.getAttribute("aria-sort"), table.tBodies[0].rows.length === rows];
  })};
"""
HOSTILE = "<script>window.hacked = true</script>"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A sweep over lengths, betas and seeds, a run that failed of something hostile, and long names."""
    for length, value in ((9, 0.3), (10, 0.2), (100, 0.1)):
        for beta in (0.1, 0.5):
            name = f"dpo.beta={beta},patch.length={length}," + "a_rather_long_key.of.somebody=1," * 3
            write(tmp_path / "sweep" / name, {"patch.length": length, "dpo.beta": beta}, value + beta / 10)
    broken = tmp_path / "sweep" / "broken"
    broken.mkdir()
    (broken / FAILED).write_text(json.dumps({"error": "E", "message": f"{HOSTILE} {'w' * 300}"}))
    (broken / "config.yaml").write_text("patch: {length: 900}")
    compare([tmp_path / "sweep"], tmp_path / "sweep")
    return tmp_path / "sweep"


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_sorts_and_fits(page: Path, tmp_path: Path, width: int, dark: bool):
    found = measured(page / "compare.html", tmp_path, width, dark, SORTED)
    is_whole(found, width, dark)
    assert found["before"] == ["–", "9", "10", "100", "9", "10", "100"]  # by beta, then by length
    assert (found["up"], found["upwards"]) == (["9", "9", "10", "10", "100", "100", "–"], "ascending")
    assert (found["down"], found["downwards"]) == (["100", "100", "10", "10", "9", "9", "–"], "descending")
    assert found["figures"] == 4
    assert found["hacked"] is False and HOSTILE in found["text"]


@pytest.mark.parametrize("width", [1280, 400])
def test_tables_of_methods_and_seeds_sort_and_fit_as_well(tmp_path: Path, width: int):
    for method, value in (("patch", 0.2), ("lora", 0.1)):
        for seed in (0, 1):
            write(
                tmp_path / "runs" / f"{method},{seed}", {"method.name": method, "seed": seed}, value + seed / 50, method
            )
    compare([tmp_path / "runs"], tmp_path / "page")
    found = measured(tmp_path / "page" / "compare.html", tmp_path, width, more=PRESSED)
    is_whole(found, width, dark=False)
    assert found["sorted"] == [["ascending", True]] * 3  # over seeds, each run, costs


def test_an_error_in_a_script_would_be_seen(tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>missing()</script>")
    with pytest.raises(AssertionError, match="missing is not defined"):
        chromium(tmp_path, "--dump-dom", page.as_uri())


def test_its_own_script_is_the_only_one_that_may_run(page: Path, tmp_path: Path):
    text = (page / "compare.html").read_text()
    (page / "compare.html").write_text(text.replace("</main>", "<script>window.hacked = true</script></main>"))
    found = measured(page / "compare.html", tmp_path, 1280, more=SORTED)
    assert found["hacked"] is False and found["upwards"] == "ascending"


@pytest.mark.parametrize(("width", "height"), [(1280, 2400), (400, 4000)])
def test_screenshot(page: Path, tmp_path: Path, width: int, height: int):
    folder = Path(os.environ.get("REPORT_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"compare-{width}.png"
    chromium(tmp_path, f"--window-size={width},{height}", f"--screenshot={picture}", (page / "compare.html").as_uri())
    assert picture.stat().st_size > 50_000
