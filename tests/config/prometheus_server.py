"""A real Prometheus on loopback: configured as we ship it, but for the targets and the pace."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from waiting import wait_for

CONFIG = Path(__file__).parents[2] / "config"
SCRAPE_SECONDS = 1


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`; fails where it is missing, a skip would hide it."""
    path = shutil.which(name)
    assert path, f"{name} is missing: apt-get install prometheus"
    return path


class Prometheus:
    """Runs while the context lasts; `targets` is host:port of each job in prometheus.yml."""

    def __init__(self, folder: Path, targets: dict[str, str]) -> None:
        self._folder = folder
        self._config = folder / "prometheus.yml"
        self._log = folder / "prometheus.log"
        self._config.write_text(yaml.safe_dump(_shipped_config(targets)))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    tool("prometheus"),
                    f"--config.file={self._config}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address={self._address}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            self.wait_for(self._answers, 60)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of the HTTP API. Raises AssertionError with Prometheus' own words."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                content = json.load(answer)
        except urllib.error.HTTPError as answer:
            with answer:
                raise AssertionError(f"{parameters}: {answer.read().decode()}") from None
        assert content["status"] == "success", content
        return content["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of `expression`."""
        result: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return result

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        """Return once `condition` holds; fail with the end of the log when it does not."""

        def log() -> str:
            return self._log.read_text()[-3000:]

        def holds() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, log()
            return condition()

        wait_for(holds, seconds, every=0.1, said=log)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _shipped_config(targets: dict[str, str]) -> dict[str, Any]:
    path = CONFIG / "prometheus" / "prometheus.yml"
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    pace = f"{SCRAPE_SECONDS}s"
    config["global"] = dict.fromkeys(config["global"], pace)
    config["rule_files"] = [str(path.parent / name) for name in config["rule_files"]]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets.pop(job["job_name"])]}]
    assert not targets, f"prometheus.yml has no job {', '.join(targets)}"
    return config
