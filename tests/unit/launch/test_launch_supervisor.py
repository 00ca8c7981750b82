"""Does a container whose start failed wait until somebody has seen it, and no longer?"""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.config.settings import Settings
from tensorserve.launch import supervisor
from tensorserve.launch.supervisor import linger
from tensorserve.telemetry import EventLog, events_path
from tensorserve.telemetry.schema import (
    EngineExited,
    Event,
    FailureScraped,
    StartBegan,
    StartFailed,
)

STARTED = StartBegan("a", "0.1.0", 0, "http://127.0.0.1:1/health", 8000, 9400)
AGAIN = StartBegan("b", "0.1.0", 1, "http://127.0.0.1:1/health", 8000, 9400)
FAILED = StartFailed("engine", 1, "m")
WAITS_FOR_LONG = "300"


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(events_path(tmp_path))


def settings_for(state_dir: Path, **variables: str) -> Settings:
    given = {"MODEL_URI": "/m", "STATE_DIR": str(state_dir), **variables}
    return Settings.from_environment({f"TENSORSERVE_{k}": v for k, v in given.items()})


@pytest.mark.parametrize(
    "events",
    [
        [STARTED, EngineExited(143)],
        [STARTED, FAILED, FailureScraped(), EngineExited(1)],
        [STARTED, FAILED, FailureScraped(), AGAIN, FAILED, FailureScraped(), EngineExited(1)],
    ],
    ids=["stopped", "scraped", "second one scraped"],
)
def test_what_was_seen_is_not_waited_for(
    tmp_path: Path, log: EventLog, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop is no failure, and one scrape is enough."""
    monkeypatch.setattr(supervisor.time, "sleep", lambda _: pytest.fail("it waits"))
    for event in events:
        log.emit(event)
    linger(settings_for(tmp_path, FAILURE_LINGER=WAITS_FOR_LONG))


@pytest.mark.parametrize(
    "before", [[], [STARTED, FAILED, FailureScraped()]], ids=["first", "second"]
)
def test_a_failure_waits_for_its_own_scrape(
    tmp_path: Path, log: EventLog, before: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an earlier start in the same container has shown another failure."""
    waits = 0

    def scrape(_: float) -> None:
        nonlocal waits
        waits += 1
        log.emit(FailureScraped())

    monkeypatch.setattr(supervisor.time, "sleep", scrape)
    for event in (*before, AGAIN if before else STARTED, FAILED, EngineExited(1)):
        log.emit(event)
    linger(settings_for(tmp_path, FAILURE_LINGER=WAITS_FOR_LONG))
    assert waits == 1
