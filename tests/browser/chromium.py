"""A headless Chromium, driven over WebDriver: opens a page, reads what a person sees, photographs.

Chromium and its driver are Debian's (`apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from waiting import wait_for

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no browser here: apt-get install chromium chromium-driver",
)

PHONE, DESKTOP = (390, 844), (1280, 900)
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
# A page may take this long to show what the log says: it asks every 0.7 s, and machines are slow.
PATIENCE = 30.0


class Browser:
    """One headless Chromium, driven over WebDriver (https://www.w3.org/TR/webdriver2/)."""

    def __init__(self, driver_port: int, profile: Path) -> None:
        self._root = f"http://127.0.0.1:{driver_port}"
        options = {
            "binary": shutil.which("chromium"),
            "args": [*SWITCHES, f"--user-data-dir={profile}"],
        }
        capabilities = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
        }
        wait_for(self._driver_is_up, PATIENCE)
        session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{session['sessionId']}"

    def open(self, url: str) -> None:
        self._ask("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """What `script` returns in the page."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def text(self) -> str:
        """The text that a person sees: hidden parts are left out."""
        return str(self.run("return document.body.innerText")).replace("\u00a0", " ")

    def wait_for_text(self, words: str, seconds: float = PATIENCE) -> None:
        wait_for(lambda: words in self.text(), seconds)

    def devtools(self, command: str, **parameters: Any) -> Any:
        body = {"cmd": command, "params": parameters}
        return self._ask("POST", f"{self._session}/goog/cdp/execute", body)

    def look_like(self, size: tuple[int, int], scheme: str) -> None:
        """A window of `size` CSS pixels, in a `light` or `dark` scheme."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=size == PHONE,
        )
        self.devtools(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": scheme},
                # A picture must not catch a bar on its way.
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )

    def screenshot(self, path: Path) -> None:
        """The whole page, also what lies below the window's edge."""
        answer = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Entries since the last call; `kind`: `browser` (the console) or `performance`."""
        return list(self._ask("POST", f"{self._session}/se/log", {"type": kind}))

    def requested(self) -> set[str]:
        """Addresses that pages have asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }

    def close(self) -> None:
        self._ask("DELETE", self._session)

    def _driver_is_up(self) -> bool:
        try:
            return bool(self._ask("GET", "/status")["ready"])
        except OSError:
            return False

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self._root + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser whose profile and driver log lie in `folder`."""
    log = folder / "chromedriver.log"
    with log.open("wb") as output:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=output, stderr=output)
    try:
        wait_for(lambda: "started successfully on port" in log.read_text(), PATIENCE)
        port = int(log.read_text().split("started successfully on port ")[1].split(".")[0])
        browser = Browser(port, folder / "profile")
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(30)
