"""How does a process keep up with a start that other processes log?"""

from __future__ import annotations

from pathlib import Path

from tensorserve.telemetry.events import Follower, read_events
from tensorserve.telemetry.fold import apply, fold
from tensorserve.telemetry.state import StartState


class StartFollower:
    """The state of the start whose log is at `path`, as of the last `poll`. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self._follower = Follower(path)
        self.state = StartState()

    def poll(self) -> StartState:
        """Take in what was logged since the last call. Raises OSError: the log is unreadable."""
        for record in self._follower.poll():
            apply(self.state, record)
        return self.state

    @property
    def damaged(self) -> int:
        """Lines skipped because they are no event."""
        return self._follower.damaged


def read_state(path: Path) -> StartState:
    """The state after every whole event of the log at `path`. Raises OSError."""
    return fold(read_events(path))
