"""The page in a real browser: nothing sticks out or is cut, at both widths, in both colour schemes.

Set REPORT_SHOTS to a folder to keep the screenshots.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import IN_A_BROWSER, chromium, is_whole, measured

from policypatch.report.run_report import write_report

pytestmark = IN_A_BROWSER


@pytest.fixture(params=["usual", "awkward", "whole"])
def run_dir(
    request: pytest.FixtureRequest,
    build_run: Callable[..., Path],
    build_whole_run: Callable[..., Path],
    hostile_text: str,
) -> Path:
    """A usual run, one with long names, unbroken and hostile texts, and more arms, and one of three risks."""
    run = build_whole_run() if request.param == "whole" else build_run()
    if request.param == "awkward":
        rows = json.loads((run / "scorecard.json").read_text())
        rows += [{**row, "arm": arm} for row in rows if row["arm"] == "sft" for arm in ("lora_rank_16", "prompt")]
        scorecard = json.dumps(rows).replace('"lstm"', '"organisation/a-rather-long-classifier-name"')
        (run / "scorecard.json").write_text(scorecard)
        samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        texts = [hostile_text, "w" * 400, "z\u0351\u0352" * 90, "\u202etxet desrever", "", "line\n" * 30]
        for i, sample in enumerate(samples):
            sample["text"] = texts[i % len(texts)]
            sample["scores"]["organisation/a-rather-long-classifier-name"] = sample["scores"].pop("lstm")
        (run / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(
            config.replace("smollm2-135m", "an_organisation__with_a_rather_long_name_of_a_model")
        )
    write_report(run)
    return run


@pytest.mark.parametrize("width", [1280, 800, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_sticks_out_and_nothing_is_cut(run_dir: Path, tmp_path: Path, width: int, dark: bool) -> None:
    more = 'return {articles: page.querySelectorAll("article").length};'
    found = measured(run_dir / "report.html", tmp_path, width, dark, more)
    is_whole(found, width, dark)
    assert found["articles"] in (20, 28)


@pytest.mark.parametrize(("width", "height"), [(1280, 9000), (400, 16000)])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_screenshot(
    run_dir: Path, tmp_path: Path, width: int, height: int, dark: bool, request: pytest.FixtureRequest
) -> None:
    folder = Path(os.environ.get("REPORT_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / (re.sub(r"\W+", "-", request.node.name) + ".png")
    size = f"--window-size={width},{height}"
    chromium(tmp_path, size, f"--screenshot={picture}", (run_dir / "report.html").as_uri(), dark=dark)
    assert picture.stat().st_size > 50_000  # a blank page of this size is a tenth of it
