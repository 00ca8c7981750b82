"""`tensorserve up`: a thin parent above supervisord. Starts, watches, passes on, reaps, ends.

supervisord exits 0 even when its program failed, and leaves orphans alone; this process does not.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import BinaryIO
from uuid import uuid4

from tensorserve import __version__
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
    UsageError,
)
from tensorserve.linux import adopt_orphans
from tensorserve.plan import make_plan
from tensorserve.preflight import check_port, prepare_state_dir
from tensorserve.settings import HANDOFF_VARIABLE, Settings
from tensorserve.start import publish_start, receive_start
from tensorserve.telemetry import EventLog, Follower, ProgressView, StartState, events_path, new_log

# Trying again does not mend these.
FINAL_CODES = frozenset(
    error.exit_code
    for error in (
        UsageError,
        CorruptError,
        SourceUnavailableError,
        PermissionDeniedError,
        ConfigurationError,
    )
)
# supervisord needs a moment more than the engine's own 3 s; after this, everything is killed.
STOP_SECONDS = 4.5
_TICK = 0.1


def up(environ: Mapping[str, str], arguments: tuple[str, ...]) -> int:
    """Run the whole container until it ends; give its exit code."""
    settings = Settings.from_environment(environ)
    plan = make_plan(settings, arguments)
    prepare_state_dir(settings.state_dir)
    check_port("metrics", settings.metrics_host, settings.metrics_port)
    adopt_orphans()
    reference = publish_start(environ, settings, arguments)
    log = new_log(settings.state_dir)
    signals = _Signals()
    for attempt in range(settings.engine_restarts + 1):
        log.emit(
            "start",
            start_id=uuid4().hex,
            version=__version__,
            attempt=attempt,
            health_url=plan.health_url,
            port=plan.port,
            metrics_port=settings.metrics_port,
        )
        code = _Container(settings, reference, log, signals).run()
        if signals.received or code in FINAL_CODES or code == 0:
            break
        print(
            f"tensorserve: the engine ended with code {code}"
            + (", starting it again" if attempt < settings.engine_restarts else ""),
            file=sys.stderr,
            flush=True,
        )
    return 128 + signals.received if signals.received else code


def supervisord_conf() -> Path:
    """The constant configuration: in the installed package, or in the source tree beside it."""
    packaged = Path(__file__).with_name("supervisord.conf")
    return packaged if packaged.exists() else Path(__file__).parents[2] / "config/supervisord.conf"


class _Signals:
    """SIGTERM and SIGINT, remembered."""

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number


class _Container:
    """One run of supervisord, from its start to the last process gone."""

    def __init__(
        self, settings: Settings, reference: str, log: EventLog, signals: _Signals
    ) -> None:
        self._settings = settings
        self._reference = reference
        self._log = log
        self._signals = signals
        self._follower = Follower(events_path(settings.state_dir))
        self._state = StartState()
        self._view = ProgressView(sys.stderr)

    def run(self) -> int:
        self._follow()
        process = self._spawn()
        assert process.stdout is not None
        assert process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, sys.stdout.buffer)
            selector.register(process.stderr, selectors.EVENT_READ, sys.stderr.buffer)
            deadline: float | None = None
            while process.poll() is None:
                self._pass_on(selector, _TICK)
                self._follow()
                _reap(process.pid)
                if self._signals.received and deadline is None:
                    deadline = time.monotonic() + self._stop_seconds()
                    process.terminate()
                if deadline is not None and time.monotonic() > deadline:
                    process.kill()
            _kill_children()
            self._pass_on(selector, 0.0)
        self._follow()
        self._view.close()
        return self._state.engine_exit if self._state.engine_exit is not None else 70

    def _spawn(self) -> subprocess.Popen[bytes]:
        settings = self._settings
        here = str(Path(sys.executable).parent)
        environment = dict(settings.environment)
        environment["PATH"] = f"{here}:{environment.get('PATH', os.defpath)}"
        environment |= {
            HANDOFF_VARIABLE: self._reference,
            "TENSORSERVE_STATE_DIR": str(settings.state_dir),
            "TENSORSERVE_METRICS_HOST": settings.metrics_host,
            "TENSORSERVE_METRICS_PORT": str(settings.metrics_port),
        }
        conf, pidfile = str(supervisord_conf()), str(settings.state_dir / "supervisord.pid")
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tensorserve.prompt_supervisord",
                "-c",
                conf,
                "--pidfile",
                pidfile,
            ],
            env=environment,
            cwd=settings.state_dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A terminal's Ctrl-C comes to us alone, and we end the rest in order.
            process_group=0,
        )

    def _stop_seconds(self) -> float:
        if not self._state.ready:
            return STOP_SECONDS
        flags = dict(self._settings.flags)
        drain = flags.get("shutdown-timeout", ("=0",))[0].partition("=")[2]
        return float(drain) + 6.0

    def _follow(self) -> None:
        events = self._follower.poll()
        for event in events:
            self._state.apply(event)
        self._view.update(self._state)

    def _pass_on(self, selector: selectors.BaseSelector, timeout: float) -> None:
        """What the programs print goes on to our own output, around the progress bar."""
        while ready := selector.select(timeout):
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                    continue
                self._view.clear()
                target: BinaryIO = key.data
                target.write(data)
                target.flush()
            timeout = 0.0
            if not selector.get_map():
                return


def _reap(spare: int) -> None:
    """Collect orphans that became ours; `spare` is collected by its own Popen."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid == spare:
            return
        os.waitpid(found.si_pid, 0)


def _kill_children() -> None:
    """End whatever is left below us. Orphans come to us (subreaper), so this finds every one."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not children:
            return
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        for child in children:
            os.waitpid(int(child), 0)


def watch(environ: Mapping[str, str]) -> None:
    """supervisord's event listener, on stdio: when the engine has ended, end supervisord."""
    while True:
        sys.stdout.write("READY\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        headers = dict(token.split(":", 1) for token in line.split())
        payload = sys.stdin.read(int(headers["len"]))
        fields = dict(token.split(":", 1) for token in payload.split())
        sys.stdout.write("RESULT 2\nOK")
        sys.stdout.flush()
        if fields.get("processname") == "engine":
            linger(receive_start(environ[HANDOFF_VARIABLE]).settings)
            os.kill(os.getppid(), signal.SIGTERM)


def linger(settings: Settings) -> None:
    """Where the container is about to end with a failure: wait until somebody has seen it.

    Otherwise the exporter would be gone before Prometheus asks again, and the failure's reason
    with it. The exporter writes `failure_scraped` after the first scrape that showed the failure.
    """
    events = Follower(events_path(settings.state_dir))
    state = StartState()
    deadline = time.monotonic() + settings.failure_linger
    while True:
        for event in events.poll():
            state.apply(event)
            if event["event"] == "failure_scraped":
                return
        if state.failure is None or _will_restart(settings, state) or time.monotonic() >= deadline:
            return
        time.sleep(_TICK)


def _will_restart(settings: Settings, state: StartState) -> bool:
    return state.starts <= settings.engine_restarts and state.engine_exit not in FINAL_CODES
