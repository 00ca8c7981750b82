"""What the log and the event log of a start say of vLLM's processes."""

from __future__ import annotations

import re

from running import Tensorserve, session_processes

_NAMES = re.compile(r"\((EngineCore|Worker\w*) pid=(\d+)\)")


def named_processes(engine: Tensorserve) -> dict[str, int]:
    """{name: process id} as vLLM writes them before its lines; all of them are there."""
    assert engine.process is not None
    named = {name: int(pid) for name, pid in _NAMES.findall(engine.text)}
    assert set(named.values()) <= set(session_processes(engine.process.pid))
    return named


def ways(engine: Tensorserve) -> dict[str | None, tuple[str, str | None]]:
    """{process: (fork or spawn, why it is spawned)} of the event log."""
    events = [event for event in engine.events() if event["event"] == "engine_process"]
    return {event.get("process"): (event["way"], event.get("reason")) for event in events}
