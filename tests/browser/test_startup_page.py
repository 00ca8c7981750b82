"""What does a person see who opens the exporter's start page in a real browser?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from chromium import DESKTOP, PHONE, Browser, needs_browser

from telemetry_starts import Client, Engine, exporting, log_start
from tensorserve.telemetry import Check, Edge, EventLog, Phase
from tensorserve.telemetry.schema import (
    CheckPassed,
    EngineExited,
    LoadCounts,
    LoadDone,
    LoadPlanned,
    LoadProgressed,
    PhaseChanged,
    StartFailed,
)

pytestmark = needs_browser

GB = 1_000_000_000


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


def address(client: Client) -> str:
    return f"http://127.0.0.1:{client.port}/"


def come_to_the_load(log: EventLog) -> None:
    """A start up to the first bytes of 3 GB, with checks as `preflight` writes them."""
    log.emit(PhaseChanged(Phase.PREFLIGHT, Edge.BEGIN))
    log.emit(CheckPassed(Check.VLLM, "0.32.0"))
    log.emit(CheckPassed(Check.WEIGHTS, "canary.tensors: 272 tensors, 3 GB"))
    log.emit(CheckPassed(Check.ENCRYPTION, "encrypted, the key opens it"))
    log.emit(PhaseChanged(Phase.PREFLIGHT, Edge.END))
    log.emit(PhaseChanged(Phase.ARTIFACTS, Edge.END))
    log.emit(PhaseChanged(Phase.IMPORT, Edge.END))
    log.emit(PhaseChanged(Phase.LOAD, Edge.BEGIN))
    log.emit(LoadPlanned(0, 3 * GB, 272, "auto"))


def copied(log: EventLog, gigabytes: float, **fields: Any) -> None:
    count = int(gigabytes * GB)
    log.emit(LoadProgressed(0, LoadCounts(count, count, count, **fields)))


def test_a_start_is_followed_to_ready_without_touching_the_page(
    tmp_path: Path, pictures: Path, engine: Engine, browser: Browser
) -> None:
    """One visit, from the first check to ready: the page follows by itself, in plain words."""
    log = log_start(tmp_path, engine)
    with exporting(tmp_path) as client:
        browser.look_like(PHONE, "light")
        browser.open(address(client))
        browser.run("window.visit = 'the first'")
        browser.wait_for_text("Checking that everything is there")
        come_to_the_load(log)
        browser.wait_for_text("Loading the model: 0 %")
        copied(log, 0.6)
        browser.wait_for_text("Loading the model: 20 %")
        copied(log, 1.26, requests=9, retries={"status_503": 2})
        browser.wait_for_text("Loading the model: 42 %")
        text = browser.text()
        assert "1.26 of 3.00 GB" in text
        assert "3 checks passed: vLLM, weights, encryption" in text
        assert "2 requests sent again: the source answered 503" in text
        assert re.search(r"Rate now\n[0-9.]+ [kMG]B/s\n", text)
        assert re.search(r"Loading the model: 42 %, [0-9.]+ [kMG]B/s, \d+ s left", text)
        for size, scheme, name in (
            (PHONE, "light", "loading-phone"),
            (PHONE, "dark", "loading-phone-dark"),
            (DESKTOP, "light", "loading-desktop"),
            (DESKTOP, "dark", "loading-desktop-dark"),
        ):
            browser.look_like(size, scheme)
            browser.screenshot(pictures / f"{name}.png")
        copied(log, 3.0)
        log.emit(LoadDone(0))
        log.emit(PhaseChanged(Phase.LOAD, Edge.END))
        log.emit(PhaseChanged(Phase.POSTPROCESS, Edge.END))
        browser.wait_for_text("Warming up the engine")
        engine.status = 200
        browser.wait_for_text("Ready after ")
        assert browser.run("return document.querySelector('progress').value") == 1
        assert browser.run("return document.title").startswith("Ready after ")
        browser.screenshot(pictures / "ready-desktop-dark.png")
        browser.look_like(PHONE, "light")
        browser.screenshot(pictures / "ready-phone.png")
        assert browser.run("return window.visit") == "the first"
        assert "canary" not in browser.run("return document.documentElement.outerHTML")


def test_no_request_leaves_and_the_console_stays_silent(
    tmp_path: Path, engine: Engine, browser: Browser
) -> None:
    """The page needs no other host, and its own policy forbids it nothing that it needs."""
    log = log_start(tmp_path, engine)
    come_to_the_load(log)
    with exporting(tmp_path) as client:
        browser.log("performance")
        browser.log("browser")
        browser.open(address(client))
        copied(log, 1.5)
        browser.wait_for_text("Loading the model: 50 %")
        asked = browser.requested()
        complaints = [entry["message"] for entry in browser.log("browser")]
    assert address(client) + "start.json" in asked
    assert {urlsplit(url).hostname for url in asked} == {"127.0.0.1"}
    assert [message for message in complaints if "favicon.ico" not in message] == []


def test_a_failure_stays_readable_after_the_container_has_gone(
    tmp_path: Path, pictures: Path, engine: Engine, browser: Browser
) -> None:
    """The exporter ends with the container; the page keeps what it knew and says so."""
    log = log_start(tmp_path, engine)
    come_to_the_load(log)
    browser.look_like(PHONE, "light")
    with exporting(tmp_path) as client:
        browser.open(address(client))
        browser.wait_for_text("Loading the model")
        log.emit(StartFailed("wrong_key", 65, "canary: wrong key"))
        log.emit(EngineExited(65))
        browser.wait_for_text("Failed: wrong key (exit code 65)")
    browser.wait_for_text("the container may have ended")
    assert "Failed: wrong key (exit code 65)" in browser.text()
    browser.screenshot(pictures / "failed-phone.png")
    assert "canary" not in browser.run("return document.documentElement.outerHTML")


def test_an_open_page_does_not_call_a_stopped_container_ready(
    tmp_path: Path, engine: Engine, browser: Browser
) -> None:
    """Nobody is left to say that it stopped; the page finds out by itself."""
    log = log_start(tmp_path, engine)
    come_to_the_load(log)
    copied(log, 3.0)
    log.emit(LoadDone(0))
    engine.status = 200
    with exporting(tmp_path) as client:
        browser.open(address(client))
        browser.wait_for_text("The engine answers requests.")
    browser.wait_for_text("the container may have ended")
    assert "The engine answers requests." not in browser.text()
    assert browser.run("return document.title") == "No answer"


def test_without_scripts_the_page_is_whole_and_reloads(
    tmp_path: Path, engine: Engine, browser: Browser
) -> None:
    """Meta refresh does what the script does otherwise."""
    log = log_start(tmp_path, engine)
    come_to_the_load(log)
    copied(log, 0.6)
    with exporting(tmp_path) as client:
        browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
        try:
            browser.open(address(client))
            browser.wait_for_text("Loading the model: 20 %")
            copied(log, 2.4)
            browser.wait_for_text("Loading the model: 80 %")
        finally:
            browser.devtools("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP, (320, 640)], ids=["phone", "desktop", "small"])
def test_nothing_sticks_out_and_every_text_has_enough_contrast(
    tmp_path: Path, engine: Engine, browser: Browser, size: tuple[int, int], scheme: str
) -> None:
    """No sideways scrolling; every text against its ground has 4.5:1 or more (WCAG 1.4.3)."""
    log = log_start(tmp_path, engine)
    come_to_the_load(log)
    copied(log, 1.26, requests=9, retries={"status_503": 2})
    log.emit(StartFailed("source_unavailable", 69, "canary"))
    with exporting(tmp_path) as client:
        browser.look_like(size, scheme)
        browser.open(address(client))
        browser.wait_for_text("Failed: ")
        wide, weak = browser.run(_MEASURE)
    assert wide <= size[0]
    assert weak == []


# WCAG 2.2, relative luminance and contrast ratio; backgrounds here are opaque colours.
_MEASURE = """
const luminance = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  return color === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : color;
};
const weak = [];
const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
  const [high, low] = [getComputedStyle(element).color, ground(element)]
    .map(luminance).sort((a, b) => b - a);
  if ((high + 0.05) / (low + 0.05) < 4.5) weak.push(walker.currentNode.textContent);
}
return [document.documentElement.scrollWidth, weak];
"""
