"""Does the page tell the truth of a real start: real vLLM, a real model, a source slowed down?"""

from __future__ import annotations

import re
from pathlib import Path

from chromium import DESKTOP, PHONE, Browser, needs_browser
from running import READY_SECONDS, Tensorserve

from rangeserver import RangeServer
from tensorserve.cli import main as tensorserve
from tensorserve.telemetry.wording import duration
from waiting import wait_for

pytestmark = needs_browser

# The model has 269 MB: some 12 s in which the page has something to show.
SLOW = 22e6


def test_a_real_start_is_followed_from_the_checks_to_ready(
    tmp_path: Path, model_dir: Path, pictures: Path, browser: Browser
) -> None:
    """Progress while the weights arrive, then ready; the page's figures are the report's."""
    words = ["pack", str(model_dir), str(tmp_path / "bundle"), "--encrypt"]
    assert tensorserve([*words, "--key-file", str(tmp_path / "key")]) == 0
    with RangeServer(tmp_path / "bundle", bytes_per_second=SLOW) as source:
        environ = {
            "TENSORSERVE_MODEL_URI": source.url,
            "TENSORSERVE_KEY_FILE": str(tmp_path / "key"),
            # Else most of it is there before vLLM asks.
            "TENSORSERVE_PREFETCH": "off",
        }
        with Tensorserve(tmp_path, environ) as engine:
            engine.wait_for(lambda: engine.get("/livez", engine.metrics_port)[0] == 200, 30)
            browser.look_like(DESKTOP, "light")
            browser.open(f"http://127.0.0.1:{engine.metrics_port}/")
            browser.wait_for_text("vLLM is starting", READY_SECONDS)
            wait_for(
                lambda: re.search(r"Loading the model: [3-8]\d %", browser.text()), READY_SECONDS
            )
            text = browser.text()
            assert re.search(r"\d+ of 269 MB", text)
            # Not which: a server that did not get its turn sends the more afterwards.
            assert re.search(r"Rate now\n\d+(\.\d)? MB/s", text), text
            assert re.search(r"Load left\n\d+ s", text), text
            browser.screenshot(pictures / "real-loading-desktop.png")
            browser.wait_for_text("Ready after ", READY_SECONDS)
            text = browser.text()
            assert "The engine answers requests." in text
            ready = re.search(r"Ready after (.+)\n", text)
            assert ready is not None
            assert "11 checks passed" in text
            for size, name in ((DESKTOP, "desktop"), (PHONE, "phone")):
                browser.look_like(size, "light")
                browser.screenshot(pictures / f"real-ready-{name}.png")
            seconds = engine.metric("tensorserve_startup_seconds")
            assert seconds is not None
            assert ready[1] == duration(seconds).replace("\u00a0", " ")
