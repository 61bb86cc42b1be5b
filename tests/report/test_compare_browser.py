"""The comparison in a real browser: it sorts, its script runs and no other may, nothing sticks out.

Set REPORT_SHOTS to a folder to keep the screenshots.
"""

import json
import os
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, chromium
from test_compare import write

from policypatch.report.compare import compare
from policypatch.report.records import FAILED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

# A page around it measures: what stands in the table's box may be wider than the page, as that box scrolls.
_PROBE = """<!doctype html><body style="margin:0">
<iframe src="compare.html" style="border:0;width:%dpx;height:900px"></iframe>
<pre id="out"></pre><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, width = page.documentElement.clientWidth;
  const name = (e) => `${e.tagName}.${e.getAttribute("class")}: ${e.textContent.trim().slice(0, 40)}`;
  const wide = [...page.body.querySelectorAll("*")].filter((e) => {
    const box = e.getBoundingClientRect();
    return box.width > 1 && !e.closest(".scroll *") && (box.right > width + 0.5 || box.left < -0.5);
  });
  const cut = [...page.querySelectorAll("figure svg text")].filter((e) => {
    const box = e.getBoundingClientRect(), frame = e.ownerSVGElement.getBoundingClientRect();
    return box.left < frame.left - 0.5 || box.right > frame.right + 0.5
      || box.top < frame.top - 0.5 || box.bottom > frame.bottom + 0.5;
  });
  const table = [...page.querySelectorAll("table.compare")].at(-1);
  const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].textContent.trim());
  const head = [...table.tHead.rows[0].cells].find((cell) => cell.textContent.includes("length"));
  const n = head.cellIndex, before = column(n);
  head.querySelector("button").click();
  const up = column(n), upwards = head.getAttribute("aria-sort");
  head.querySelector("button").click();
  document.getElementById("out").textContent = JSON.stringify({
    width, scroll: page.documentElement.scrollWidth, wide: wide.map(name), cut: cut.map(name),
    before, up, upwards, down: column(n), downwards: head.getAttribute("aria-sort"),
    background: page.defaultView.getComputedStyle(page.body).backgroundColor, hacked: page.defaultView.hacked || false,
    figures: page.querySelectorAll("figure").length, text: page.body.innerText,
  });
};
</script></body>"""

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
    (page / "probe.html").write_text(_PROBE % width)
    probe = ["--allow-file-access-from-files", "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"]
    dom = chromium(tmp_path, *probe, (page / "probe.html").as_uri(), dark=dark)
    found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    assert found and found[1], "the probe did not run"
    measured = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert measured["before"] == ["–", "9", "10", "100", "9", "10", "100"]  # by beta, then by length
    assert (measured["up"], measured["upwards"]) == (["9", "9", "10", "10", "100", "100", "–"], "ascending")
    assert (measured["down"], measured["downwards"]) == (["100", "100", "10", "10", "9", "9", "–"], "descending")
    assert measured["width"] == width and measured["scroll"] <= width
    assert measured["wide"] == [] and measured["cut"] == []
    assert measured["figures"] == 4
    assert measured["hacked"] is False and HOSTILE in measured["text"]
    assert measured["background"] == ("rgb(18, 22, 27)" if dark else "rgb(255, 255, 255)")


def test_its_own_script_is_the_only_one_that_may_run(page: Path, tmp_path: Path):
    text = (page / "compare.html").read_text()
    (page / "compare.html").write_text(text.replace("</main>", "<script>window.hacked = true</script></main>"))
    (page / "probe.html").write_text(_PROBE % 1280)
    probe = ["--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"]
    dom = chromium(tmp_path, *probe, (page / "probe.html").as_uri())
    assert '"hacked":false' in dom and '"upwards":"ascending"' in dom


@pytest.mark.parametrize(("width", "height"), [(1280, 2400), (400, 4000)])
def test_screenshot(page: Path, tmp_path: Path, width: int, height: int):
    folder = Path(os.environ.get("REPORT_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"compare-{width}.png"
    chromium(tmp_path, f"--window-size={width},{height}", f"--screenshot={picture}", (page / "compare.html").as_uri())
    assert picture.stat().st_size > 50_000
