"""How does `tensorserve up` run the container? As a thin parent of supervisord.

It passes signals and output on, reaps orphans and returns the engine's exit code: supervisord exits
with 0 even when its program failed, and does not reap orphans.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import BinaryIO
from uuid import uuid4

from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.config.variables import HANDOFF_VARIABLE
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
    TensorserveError,
    UsageError,
)
from tensorserve.launch.companions import (
    COMPANIONS_VARIABLE,
    CompanionContext,
    publish_companions,
    receive_companions,
)
from tensorserve.launch.context import Start, publish_start
from tensorserve.launch.preflight import check_port, prepare_state_dir
from tensorserve.launch.stopping import supervisor_seconds
from tensorserve.linux import adopt_orphans
from tensorserve.telemetry import (
    EventLog,
    ProgressView,
    StartFollower,
    StartState,
    events_path,
    new_log,
)
from tensorserve.telemetry.output import OutputWatch
from tensorserve.telemetry.schema import StartBegan
from tensorserve.version import __version__

# Starting again would not help.
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
_TICK = 0.1
_KILL_TICK = 0.01
_KILL_SECONDS = 10.0


def up(environ: Mapping[str, str], arguments: tuple[str, ...]) -> int:
    """Run the whole container until it ends; give its exit code."""
    settings = Settings.from_environment(environ)
    for warning in settings.warnings:
        print(f"tensorserve: warning: {warning}", file=sys.stderr, flush=True)
    plan = make_plan(settings, arguments)
    prepare_state_dir(settings.state_dir)
    check_port("metrics", settings.metrics_host, settings.metrics_port)
    adopt_orphans()
    # Printed above: child processes do not repeat them.
    start = Start(replace(settings, warnings=()), plan)
    companions = CompanionContext(
        state_dir=settings.state_dir,
        metrics_host=settings.metrics_host,
        metrics_port=settings.metrics_port,
        engine_restarts=settings.engine_restarts,
        failure_linger=settings.failure_linger,
    )
    references = {
        HANDOFF_VARIABLE: publish_start(start),
        COMPANIONS_VARIABLE: publish_companions(companions),
    }
    log = new_log(settings.state_dir)
    signals = _Signals()
    for attempt in range(settings.engine_restarts + 1):
        log.emit(
            StartBegan(
                start_id=uuid4().hex,
                version=__version__,
                attempt=attempt,
                health_url=plan.health_url,
                port=plan.port,
                metrics_port=settings.metrics_port,
            )
        )
        code = _Container(start, references, log, signals).run()
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
    """supervisord's configuration: in the installed package, or in the source tree."""
    packaged = Path(__file__).parents[1] / "supervisord.conf"
    return packaged if packaged.exists() else Path(__file__).parents[3] / "config/supervisord.conf"


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
        self, start: Start, references: dict[str, str], log: EventLog, signals: _Signals
    ) -> None:
        self._start = start
        self._references = references
        self._log = log
        self._signals = signals
        self._follower = StartFollower(events_path(start.settings.state_dir))
        self._state = self._follower.state
        self._view = ProgressView(sys.stderr)
        self._output = OutputWatch(log)

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
                self._output.tell(time.monotonic())
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
        code = self._state.engine_exit
        return TensorserveError.exit_code if code is None else code

    def _spawn(self) -> subprocess.Popen[bytes]:
        settings = self._start.settings
        here = str(Path(sys.executable).parent)
        environment = dict(settings.environment)
        environment["PATH"] = f"{here}:{environment.get('PATH', os.defpath)}"
        environment |= self._references
        conf, pidfile = str(supervisord_conf()), str(settings.state_dir / "supervisord.pid")
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tensorserve.launch.supervisord",
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
            # Ctrl-C of a terminal reaches this process only, which stops the others in order.
            process_group=0,
        )

    def _stop_seconds(self) -> float:
        drain = self._start.plan.options.drain_seconds
        return supervisor_seconds(drain, serving=self._state.ready)

    def _follow(self) -> None:
        self._view.update(self._follower.poll())

    def _pass_on(self, selector: selectors.BaseSelector, timeout: float) -> None:
        """Copy what the programs print to this process's output, around the progress bar."""
        while ready := selector.select(timeout):
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                    continue
                if not self._state.ready:
                    self._output.take(key.fd, data)
                self._view.clear()
                target: BinaryIO = key.data
                target.write(data)
                target.flush()
            timeout = 0.0
            if not selector.get_map():
                return


def _reap(spare: int) -> None:
    """Reap orphans that were reparented to this process; `spare` is reaped by its Popen."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid == spare:
            return
        os.waitpid(found.si_pid, 0)


def _kill_children() -> None:
    """Kill all descendants that are left. As a subreaper this process finds every orphan."""
    # Only what makes processes faster than they are killed, or does not end, is left.
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        try:
            # The list may leave some out while others end (proc(5)); this does not.
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(_KILL_TICK)


def watch(reference: str) -> None:
    """supervisord's event listener, on stdio: when the engine has ended, end supervisord.

    `reference`: where `up` has left the CompanionContext.
    """
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
            linger(receive_companions(reference))
            os.kill(os.getppid(), signal.SIGTERM)


def linger(companions: CompanionContext) -> None:
    """After a failure that ends the container, wait for a scrape that shows it, with a deadline.

    Otherwise the exporter would end before Prometheus scrapes the failure's reason. The exporter
    logs when a scrape has shown the failure.
    """
    follower = StartFollower(events_path(companions.state_dir))
    deadline = time.monotonic() + companions.failure_linger
    while True:
        state = follower.poll()
        if state.failure_scraped:
            return
        if (
            state.failure is None
            or _will_restart(companions, state)
            or time.monotonic() >= deadline
        ):
            return
        time.sleep(_TICK)


def _will_restart(companions: CompanionContext, state: StartState) -> bool:
    return state.starts <= companions.engine_restarts and state.engine_exit not in FINAL_CODES
