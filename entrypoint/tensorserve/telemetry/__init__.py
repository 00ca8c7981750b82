"""What a start is doing and how long it takes: event log, state, progress, report, exporter.

`exporter`, `metrics` and `report` are imported by name only: vLLM's workers need none of them.
"""

from tensorserve.telemetry.events import (
    Event,
    EventLog,
    Follower,
    events_path,
    new_log,
    read_events,
)
from tensorserve.telemetry.progress import ProgressView
from tensorserve.telemetry.state import PHASES, StartState, fold

__all__ = [
    "PHASES",
    "Event",
    "EventLog",
    "Follower",
    "ProgressView",
    "StartState",
    "events_path",
    "fold",
    "new_log",
    "read_events",
]
