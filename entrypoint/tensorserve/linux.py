"""System calls of Linux that Python has no function for."""

from __future__ import annotations

import ctypes
import os

FALLOC_PUNCH_HOLE = 3  # with FALLOC_FL_KEEP_SIZE, linux/falloc.h


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): set aside bytes of a file (mode 0), or give them back. Raises OSError.

    Unlike os.posix_fallocate it writes no zeros where the file system has no such call.
    """
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
    if function(descriptor, mode, offset, length):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
