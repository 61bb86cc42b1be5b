"""The page in a real browser over a real server: asked, both answer, side by side.

Set REPORT_SHOTS to a folder to keep the screenshots.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from tiny_server import listening

from policypatch.serve.engine import Engine
from policypatch.serve.protocol import ChatAsked, read
from policypatch.serve.served import Served

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no chromium: apt-get install chromium-driver"),
]
KEY = "a key of many letters"


@pytest.fixture(params=[None, KEY], ids=["open", "with a key"])
def address(request: pytest.FixtureRequest, engine: Engine, tiny_base) -> Iterator[str]:
    """Of a server that listens on the loopback."""
    with listening(tiny_base, engine, request.param) as address:
        yield address


@pytest.fixture(params=[(1280, False), (400, True)], ids=["wide and light", "narrow and dark"])
def browser(request: pytest.FixtureRequest) -> Iterator[webdriver.Chrome]:
    """Headless, of a size and a colour scheme."""
    width, dark = request.param
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    yield driver
    driver.quit()


def texts(browser: webdriver.Chrome, css: str) -> list[str]:
    return [element.get_attribute("textContent") for element in browser.find_elements(By.CSS_SELECTOR, css)]


def test_both_answer(address: str, browser: webdriver.Chrome, alone, engine: Engine, request: pytest.FixtureRequest):
    browser.get(address)
    wait = WebDriverWait(browser, 20)
    if "with a key" in request.node.name:
        wait.until(lambda b: "API key" in b.find_element(By.ID, "problem").text)
        browser.find_element(By.ID, "key").send_keys(KEY)
    else:
        wait.until(lambda b: b.find_element(By.ID, "base").text == "tiny")
    browser.find_element(By.ID, "prompt").send_keys("The harbour was quiet")
    browser.find_element(By.ID, "tokens").clear()
    browser.find_element(By.ID, "tokens").send_keys("12")
    browser.find_element(By.ID, "go").click()
    wait.until(lambda b: all(" tokens in " in note for note in texts(b, ".note")))

    models = [select.get_property("value") for select in browser.find_elements(By.CSS_SELECTOR, ".model")]
    assert models == ["base", "base+tox+bias"]
    for model, answer in zip(models, texts(browser, ".answer"), strict=True):
        body = {"model": model, "messages": [{"role": "user", "content": "The harbour was quiet"}]}
        job = Served(engine, {}).job(read(ChatAsked, body | {"temperature": 0, "max_tokens": 12}))
        assert answer == engine.base.decode_after(job.prompt, alone(job)), texts(browser, ".note")
    assert not browser.find_element(By.ID, "problem").is_displayed()
    width = browser.execute_script("return document.documentElement.clientWidth")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [error for error in errors if "401" not in error] == []
    if shots := os.environ.get("REPORT_SHOTS"):
        name = request.node.name.split("[")[1].rstrip("]").replace(" ", "_")
        browser.get_screenshot_as_file(str(Path(shots) / f"serve_{name}.png"))
