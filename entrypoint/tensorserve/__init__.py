"""tensorserve: encrypted Tensorizer models, served by vLLM, with a start one can watch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorserve.standalone import llm_kwargs

__version__ = "0.1.0"
__all__ = ["__version__", "llm_kwargs"]


def __getattr__(name: str) -> Any:
    # Not at import: every command would pay for what only Python users need.
    if name == "llm_kwargs":
        from tensorserve.standalone import llm_kwargs

        return llm_kwargs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
