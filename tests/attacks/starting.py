"""A start of `tensorserve serve`, as a user makes it, that must not get as far as vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3server import free_ports

from waiting import wait_for

PROGRAM = str(Path(sys.executable).with_name("tensorserve"))
SECONDS = 120.0


@dataclass(frozen=True)
class Ended:
    """How a start ended."""

    code: int | None
    """None: it got as far as vLLM, and was killed there."""
    text: str
    events: list[dict[str, Any]]
    model_dir: Path
    """Where vLLM would find configuration and tokenizer."""

    @property
    def mode(self) -> str | None:
        """What vouched for the weights, as the metric says it."""
        return next((e["mode"] for e in self.events if e["event"] == "verification"), None)


def start(directory: Path, environ: dict[str, str], *arguments: str) -> Ended:
    """Run it until it ends, or until vLLM would be imported."""
    port, metrics_port = free_ports(2)
    state = Path(tempfile.mkdtemp(prefix="state-", dir=directory))
    environment = {
        **_ours(),
        "HF_HUB_OFFLINE": "1",
        "TENSORSERVE_STATE_DIR": str(state),
        "TENSORSERVE_HOST": "127.0.0.1",
        "TENSORSERVE_METRICS_HOST": "127.0.0.1",
        "TENSORSERVE_PORT": str(port),
        "TENSORSERVE_METRICS_PORT": str(metrics_port),
        "TENSORSERVE_MODEL_NAME": "model",
        "TENSORSERVE_PREFETCH": "off",
        # The same checks; each start would import vLLM beside them, which is most of its work.
        "TENSORSERVE_IMPORT_ONCE": "off",
    }
    log = directory / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [PROGRAM, "serve", "--", *arguments],
            env=environment | environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(
            lambda: process.poll() is not None or _imports(_events(state)),
            SECONDS,
            every=0.02,
            said=log.read_text,
        )
    finally:
        code = process.poll()
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    assert "Traceback" not in text, text
    return Ended(code, text, _events(state), state / "model")


def refused(directory: Path, environ: dict[str, str], *arguments: str, code: int = 65) -> str:
    """What is said by a start that must end with `code`, vLLM not started."""
    ended = start(directory, environ, *arguments)
    assert ended.code == code, (ended.code, ended.text)
    assert not _imports(ended.events)
    return ended.text


def command(word: str, environ: dict[str, str], *arguments: str) -> tuple[int, str]:
    """(exit code, what it printed) of another command of ours."""
    done = subprocess.run(
        [PROGRAM, word, *arguments],
        env=_ours() | environ,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def _ours() -> dict[str, str]:
    return {name: os.environ.get(name, "") for name in ("PATH", "PYTHONPATH")}


def _imports(events: list[dict[str, Any]]) -> bool:
    return any(e["event"] == "phase" and e["phase"] == "import" for e in events)


def _events(state: Path) -> list[dict[str, Any]]:
    path = state / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
