"""An event log, written by the real EventLog, after which every one of our metrics has a sample."""

from __future__ import annotations

from pathlib import Path

from tensorserve.telemetry import PHASES, Edge, EventLog, Phase, events_path
from tensorserve.telemetry.schema import (
    LoadCounts,
    LoadDone,
    LoadPlanned,
    LoadProgressed,
    PhaseChanged,
    StartBegan,
    StartFailed,
    VerificationKnown,
)


def write_complete_log(state_dir: Path, health_url: str) -> None:
    """A start that failed, and one of two ranks after it that is loaded and warming up."""
    log = EventLog(events_path(state_dir))
    log.emit(StartBegan("a", "0.1.0", 0, health_url, 8000, 9400))
    log.emit(StartFailed("source_unavailable", 69, "m"))
    log.emit(StartBegan("b", "0.1.0", 1, health_url, 8000, 9400))
    log.emit(VerificationKnown("manifest"))
    for phase in PHASES:
        log.emit(PhaseChanged(phase, Edge.BEGIN))
        if phase is Phase.LOAD:
            for rank in (0, 1):
                _load(log, rank)
        if phase != PHASES[-1]:
            log.emit(PhaseChanged(phase, Edge.END))


def _load(log: EventLog, rank: int) -> None:
    log.emit(LoadPlanned(rank, 1000, 3, "auto", "libcurl", sharing="one_rank", opens=1000))
    for done in (400, 1000):
        bytes_and_seconds = (done, done, done, *[done / 1000] * 3)
        retries = {"reset": 1, "status_503": 2}
        counts = LoadCounts(*bytes_and_seconds, requests=done // 100, retries=retries)
        log.emit(LoadProgressed(rank, counts))
    log.emit(LoadDone(rank))
