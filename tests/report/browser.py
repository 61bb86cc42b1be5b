"""A headless browser for the tests that look at pages."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
IN_A_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


def chromium(folder: Path, *arguments: str, dark: bool = False) -> str:
    """What Chromium prints; it raises where the browser fails, or an error of a script was not caught."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [str(CHROMIUM), *FLAGS, scheme, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "Uncaught" in line]
    assert not errors, errors
    return done.stdout


# A page runs no script but its own, so a page around it measures: it shows it in a frame of the width asked for. What
# stands in a box that scrolls may be wider than the page.
_PROBE = """<!doctype html><body style="margin:0">
<iframe src="%(page)s" style="border:0;width:%(width)dpx;height:900px"></iframe>
<pre id="out"></pre><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, width = page.documentElement.clientWidth;
  for (const fold of page.querySelectorAll("details")) fold.open = true;
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
  const more = ((page) => { %(more)s })(page);
  document.getElementById("out").textContent = JSON.stringify({
    width, scroll: page.documentElement.scrollWidth, wide: wide.map(name), cut: cut.map(name),
    background: page.defaultView.getComputedStyle(page.body).backgroundColor, ...more,
  });
};
</script></body>"""


def measured(page: Path, profile: Path, width: int, dark: bool = False, more: str = "return {};") -> dict[str, Any]:
    """What sticks out of a page or is cut in it at a width, its background, and what the JavaScript `more` returns."""
    probe = page.parent / "probe.html"
    probe.write_text(_PROBE % {"page": page.name, "width": width, "more": more})
    flags = ["--allow-file-access-from-files", "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"]
    dom = chromium(profile, *flags, probe.as_uri(), dark=dark)
    found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    assert found and found[1], "the probe did not run"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def is_whole(found: dict[str, Any], width: int, dark: bool) -> None:
    """Nothing sticks out, nothing is cut, and the colours are those of the scheme."""
    assert found["width"] == width and found["scroll"] <= width
    assert found["wide"] == [] and found["cut"] == []
    assert found["background"] == ("rgb(18, 22, 27)" if dark else "rgb(255, 255, 255)")
