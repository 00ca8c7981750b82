"""What is a place: a case that is ready for loads, with the loading process's environment?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_KEPT = (
    "PATH HOME LANG PYTHONPATH TMPDIR LD_LIBRARY_PATH CUDA_VISIBLE_DEVICES PYTHONDONTWRITEBYTECODE"
).split()


@dataclass(frozen=True)
class Place:
    """A case, ready: its servers run."""

    name: str
    title: str
    uris: Mapping[str, str]
    """{kind: URI}"""
    environment: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[str], str | None] = lambda _: None
    """Called with the kind before each load; returns a problem, or None."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Measured properties of the place, for the result."""


def clean_environment() -> dict[str, str]:
    """Enough to run Python; nothing of this machine's AWS or tensorserve settings."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ}
