"""tensorserve: encrypted Tensorizer models, served by vLLM, with a start one can watch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorserve.version import __version__

if TYPE_CHECKING:
    from tensorserve.engine.api import llm_kwargs

__all__ = ["__version__", "llm_kwargs"]


def __getattr__(name: str) -> Any:
    # Not at import: every command would pay for what only Python users need.
    if name == "llm_kwargs":
        from tensorserve.engine.api import llm_kwargs

        return llm_kwargs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
