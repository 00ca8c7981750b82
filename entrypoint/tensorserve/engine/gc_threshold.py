"""How is Python's garbage collector slowed down while vLLM imports?

The imports of each vLLM process create a million objects that are never freed. With Python's own
threshold collections take a quarter of the import time, with one of 50,000 objects still a twelfth
(vLLM 0.32.0, Python 3.11). What is garbage meanwhile takes some 15 MB.
"""

from __future__ import annotations

import gc

# New objects between two collections (gc.set_threshold); Python's default is 700. More than all
# imports create, so that there is none; but no switch that others might turn on again.
_RAISED_THRESHOLD = 10_000_000
_original: tuple[int, int, int] | None = None


def rarely_collect() -> None:
    """Raises the collector's threshold until `collect_as_usual` is called.

    A process that never calls it only uses more memory for garbage.
    """
    global _original
    if _original is None:
        _original = gc.get_threshold()
        gc.set_threshold(max(_RAISED_THRESHOLD, _original[0]), *_original[1:])


def collect_as_usual() -> None:
    """Restores the threshold that `rarely_collect` changed, if it was called."""
    global _original
    if _original is not None:
        gc.set_threshold(*_original)
        _original = None
