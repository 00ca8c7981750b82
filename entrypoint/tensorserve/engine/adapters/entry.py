"""What is known of one adapter in memory, within which limits, and who is using it?"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from tensorserve.engine.adapters.source import Held

REMOVED, CHANGED, UNUSED, EVICTED, UNLOADED = (
    "removed", "changed", "unused", "evicted", "unloaded"
)  # fmt: skip
"""Why an adapter ends."""


@dataclass(frozen=True)
class Limits:
    """Bounds: `allowed` names (empty: all), seconds, how many, bytes."""

    allowed: tuple[str, ...]
    ttl: float
    count: int
    memory: int


@dataclass(eq=False)
class Entry:
    """An adapter in memory."""

    held: Held
    looked_at: float
    """When the store was last asked, and had it."""
    due_at: float
    """When it is asked again."""
    used_at: float
    in_use_until: float = 0.0
    """Until then a request may be on its way to the engine, or an aborted one still in it."""
    asked_at: float = 0.0
    """When the request came that vLLM loads it for."""
    lora_id: int | None = None
    """vLLM's, once it has loaded it."""
    tries: int = 0
    """How often vLLM was given it and has not loaded it."""
    requests: int = 0
    """Requests that have it and are not answered yet."""
    checking: bool = False


REQUEST: ContextVar[list[Entry] | None] = ContextVar("tensorserve_adapters", default=None)
"""The adapters of the request that is being answered (engine/adapters/middleware.py)."""
