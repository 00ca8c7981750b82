"""System calls of Linux that Python has no function for."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import select
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from functools import cache

FALLOC_PUNCH_HOLE = 3  # with FALLOC_FL_KEEP_SIZE, linux/falloc.h
MADV_POPULATE_WRITE = 23  # Linux 5.14, linux/mman.h
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
PR_SET_DUMPABLE, PR_GET_DUMPABLE, PR_SET_PDEATHSIG = 4, 3, 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = mmap.PAGESIZE


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): set aside bytes of a file (mode 0), or give them back. Raises OSError.

    Unlike os.posix_fallocate it writes no zeros where the file system has no such call.
    """
    if _libc().fallocate(descriptor, mode, offset, length):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def start_writing(descriptor: int) -> None:
    """sync_file_range(2): what was written to a file starts on its way to the disk; no waiting.

    Only a head start: where it cannot be done nothing is. fsync is still needed.
    """
    _libc().sync_file_range(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE)


def no_core_files() -> None:
    """This process and all that come from it leave no core file, nor hand one to a program.

    A limit of 0 keeps files away, but where core_pattern is a pipe (systemd-coredump, apport) the
    kernel asks for no limit, with one exception: at 1 it ends the dump (fs/coredump.c). 1 byte is
    also too little for a file. Inherited by children and across exec, unlike PR_SET_DUMPABLE.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except ValueError:  # lowered to 0 before us, and not ours to raise
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def hide_memory() -> None:
    """PR_SET_DUMPABLE 0: no core, and no other process of this user looks into this one.

    Nor opens its /proc/<pid>/fd: not for a process whose memory others take over (handoff.py). The
    kernel takes it back at exec. pidfd_getfd, process_vm_readv and debuggers end here as well.
    """
    _prctl(PR_SET_DUMPABLE, 0)


def end_with_parent() -> None:
    """SIGKILL for this process when the thread that made it ends; kept across exec, not by forks.

    So it is for children that a main thread makes. A parent that is gone already is not noticed.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """What a child leaves behind when it ends becomes this process's child, not process 1's.

    Where the kernel refuses, it is process 1's, which in a container often is this one.
    """
    with suppress(OSError):
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if _libc().prctl(option, value, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


class Watched:
    """Another process, of which one learns when it has ended."""

    def __init__(self, pid: int) -> None:
        self._descriptor: int | None = None
        self._ended = False
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended = True
        except OSError:
            return  # no such call here (a sandbox): then nobody tells
        self._poll = select.poll()
        if self._descriptor is not None:
            self._poll.register(self._descriptor, select.POLLIN)

    def ended(self, seconds: float) -> bool:
        """Whether it has; waits for it at most so long, and less where a signal handler runs."""
        if self._ended:
            return True
        if self._descriptor is None:
            time.sleep(seconds)
        else:
            self._ended = bool(self._poll.poll(seconds * 1000))
        return self._ended


def run_on(processors: Collection[int]) -> None:
    """Let this thread run on `processors`, as far as they can still be had.

    vLLM binds its worker, and with it every thread made there, to some of them.
    """
    with suppress(OSError):
        os.sched_setaffinity(0, processors)


def populate(memory: memoryview) -> None:
    """madvise(2), MADV_POPULATE_WRITE: the kernel finds all pages of `memory` in one call.

    A fault for each page, as it is written, costs half as much again. Where it cannot be done
    nothing is: the pages then come as they are written. Not for page-locked memory: its pages are
    there, and the kernel refuses mappings of a driver.
    """
    if len(memory) < 16 * _PAGE or not _populates():
        return
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first, end = -(-start // _PAGE) * _PAGE, (start + len(memory)) // _PAGE * _PAGE
    _libc().madvise(first, end - first, MADV_POPULATE_WRITE)


@cache
def _populates() -> bool:
    """Whether the kernel knows the call. Tried on a page of our own: EINVAL has other reasons."""
    with mmap.mmap(-1, _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        place = ctypes.c_char.from_buffer(page)
        refused = _libc().madvise(ctypes.addressof(place), _PAGE, MADV_POPULATE_WRITE)
        known = not refused or ctypes.get_errno() != errno.EINVAL
        del place  # the map cannot be closed while somebody points into it
        return known


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
    offsets = (ctypes.c_longlong, ctypes.c_longlong)
    library.sync_file_range.argtypes = (ctypes.c_int, *offsets, ctypes.c_uint)
    return library
