"""The load pipeline: from a source's ranges to finished tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorserve.loading.counters import LoadProgress, report_every

if TYPE_CHECKING:
    from tensorserve.loading.stream import LoadOptions, TensorStream

__all__ = ["LoadOptions", "LoadProgress", "TensorStream", "report_every"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import; the process that only fetches ahead does without it.
    if name in __all__:
        from tensorserve.loading import stream

        return getattr(stream, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
