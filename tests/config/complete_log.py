"""An event log, written by the real EventLog, after which every one of our metrics has a sample."""

from __future__ import annotations

from pathlib import Path

from tensorserve.telemetry import PHASES, EventLog, events_path


def write_complete_log(state_dir: Path, health_url: str) -> None:
    """A start that failed, and one of two ranks after it that is loaded and warming up."""
    log = EventLog(events_path(state_dir))
    log.emit("start", start_id="a", version="0.1.0", health_url=health_url)
    log.emit("failure", reason="source_unavailable", exit_code=69, message="m")
    log.emit("start", start_id="b", version="0.1.0", health_url=health_url)
    log.emit("verification", mode="manifest")
    for phase in PHASES:
        log.emit("phase", phase=phase, state="begin")
        if phase == "load":
            for rank in (0, 1):
                _load(log, rank)
        if phase != PHASES[-1]:
            log.emit("phase", phase=phase, state="end")


def _load(log: EventLog, rank: int) -> None:
    stages = ("fetch", "decrypt", "copy")
    log.emit("load_plan", rank=rank, bytes=1000, tensors=3)
    for done in (400, 1000):
        log.emit(
            "load_progress",
            rank=rank,
            **dict.fromkeys(stages, done),
            **{f"{stage}_seconds": done / 1000 for stage in stages},
            requests=done // 100,
            retries={"reset": 1, "status_503": 2},
        )
    log.emit("load_done", rank=rank)
