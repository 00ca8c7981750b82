"""Python is kept from looking for garbage again and again while vLLM imports.

The imports of each of its processes make a million objects that all stay. To look through them is
a quarter of the time (vLLM 0.32.0, Python 3.11).
"""

from __future__ import annotations

import gc

# Objects that may be made before Python looks; its own number is 700.
_RARELY = 50_000
_usual: tuple[int, int, int] | None = None


def rarely_collect() -> None:
    """Look for garbage less often until `collect_as_usual`.

    Where that is never called there is no harm: less often is still often enough.
    """
    global _usual
    if _usual is None:
        _usual = gc.get_threshold()
        gc.set_threshold(max(_RARELY, _usual[0]), *_usual[1:])


def collect_as_usual() -> None:
    """As before `rarely_collect`, where that was called."""
    global _usual
    if _usual is not None:
        gc.set_threshold(*_usual)
        _usual = None
