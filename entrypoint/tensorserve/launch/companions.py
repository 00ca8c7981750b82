"""What do the exporter and the event listener need of a start? Nothing that is secret."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tensorserve.launch import handoff
from tensorserve.launch.codec import decode, encode

COMPANIONS_VARIABLE = "TENSORSERVE_INTERNAL_COMPANIONS"


@dataclass(frozen=True)
class CompanionContext:
    """The settings of the exporter and of supervisord's event listener."""

    state_dir: Path
    metrics_host: str
    metrics_port: int
    engine_restarts: int
    failure_linger: float
    """Seconds."""


def publish_companions(companions: CompanionContext) -> str:
    """Leave it for child processes; the reference goes into `COMPANIONS_VARIABLE`."""
    return handoff.publish_json(encode(companions))


def receive_companions(reference: str) -> CompanionContext:
    """What a parent left at `reference`. Raises TensorserveError."""
    return decode(CompanionContext, handoff.receive_json(reference))
