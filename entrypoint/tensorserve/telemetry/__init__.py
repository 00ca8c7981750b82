"""What is a start doing and how long does it take: event log, state, progress, report, exporter.

`exporter`, `metrics` and `report` are imported by name only: vLLM's workers need none of them.
"""

from tensorserve.telemetry.events import EventLog, Follower, events_path, new_log, read_events
from tensorserve.telemetry.fold import fold
from tensorserve.telemetry.following import StartFollower, read_state
from tensorserve.telemetry.names import PHASES, Check, Edge, Phase, Stage
from tensorserve.telemetry.progress import ProgressView
from tensorserve.telemetry.state import StartState

__all__ = [
    "PHASES",
    "Check",
    "Edge",
    "EventLog",
    "Follower",
    "Phase",
    "ProgressView",
    "Stage",
    "StartFollower",
    "StartState",
    "events_path",
    "fold",
    "new_log",
    "read_events",
    "read_state",
]
