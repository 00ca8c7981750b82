"""One run of the bench at a time in a checkout, ended cleanly by Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import fcntl
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from bench.directories import CACHE
from bench.running import MismatchError


def run_alone(run: Callable[[], int]) -> int:
    """`run`'s code; 1 on a mismatch, 75 if another run is going on, 130 on Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with _lock():
            return run()
    except MismatchError as error:
        print(f"\nMISMATCH: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


@contextmanager
def _lock() -> Iterator[None]:
    # Two runs would distort each other's figures, and their S3 servers share one directory.
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another run of the bench is going on here: wait for its end", file=sys.stderr)
            sys.exit(75)
        yield


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
