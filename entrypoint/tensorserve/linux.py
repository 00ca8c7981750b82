"""Which Linux system calls are used that Python's library does not offer?"""

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
PR_SET_DUMPABLE, PR_SET_PDEATHSIG = 4, 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = mmap.PAGESIZE


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): reserves bytes of a file (mode 0), or frees them. Raises OSError.

    Unlike os.posix_fallocate, it does not write zeros if the file system lacks the call.
    """
    if _libc().fallocate(descriptor, mode, offset, length):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def start_writing(descriptor: int) -> None:
    """sync_file_range(2): starts writeback of a file's dirty pages without waiting.

    Errors are ignored, since this only saves time; fsync is still needed.
    """
    _libc().sync_file_range(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE)


def no_core_files() -> None:
    """Prevents core dumps of this process and its descendants, to files and to programs.

    RLIMIT_CORE 0 prevents files. If core_pattern is a pipe (systemd-coredump, apport), the kernel
    ignores the limit, except for the value 1, which ends the dump (fs/coredump.c). 1 byte is also
    too small for a file. The limit is inherited by children and kept across exec, unlike
    PR_SET_DUMPABLE.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except ValueError:  # the hard limit is 0 already and may not be raised
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def hide_memory() -> None:
    """PR_SET_DUMPABLE 0: no core dump, and other processes of this user cannot read this process.

    It blocks debuggers, process_vm_readv, pidfd_getfd and /proc/<pid>/fd. So it must not be used in
    a process whose memfd others open through /proc (launch/handoff.py). exec resets it.
    """
    _prctl(PR_SET_DUMPABLE, 0)


def end_with_parent() -> None:
    """PR_SET_PDEATHSIG: SIGKILL for this process when the thread that created it ends.

    Use it only in children created by a main thread. It is kept across exec and not inherited by
    forks. It has no effect if the parent has ended already.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """PR_SET_CHILD_SUBREAPER: orphaned descendants become children of this process.

    If the kernel refuses, they become children of process 1, which is often this process in a
    container.
    """
    with suppress(OSError):
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if _libc().prctl(option, value, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


class Watched:
    """Another process, observed through a pidfd until it ends."""

    def __init__(self, pid: int) -> None:
        self._descriptor: int | None = None
        self._ended = False
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended = True
        except OSError:
            return  # pidfd_open is missing (a sandbox): the end cannot be observed
        self._poll = select.poll()
        if self._descriptor is not None:
            self._poll.register(self._descriptor, select.POLLIN)

    def ended(self, seconds: float) -> bool:
        """Waits up to `seconds` for the end (less if a signal handler runs); whether it ended."""
        if self._ended:
            return True
        if self._descriptor is None:
            time.sleep(seconds)
        else:
            self._ended = bool(self._poll.poll(seconds * 1000))
        return self._ended


def run_on(processors: Collection[int]) -> None:
    """Lets this thread run on `processors`, if the kernel allows it.

    vLLM binds its worker to some processors, and threads created there inherit the binding.
    """
    with suppress(OSError):
        os.sched_setaffinity(0, processors)


def populate(memory: memoryview) -> None:
    """madvise(2), MADV_POPULATE_WRITE: allocates all pages of `memory` in one call.

    One page fault for each page costs 1.5 times as much. If the call is not possible, nothing is
    done, and the pages are allocated as they are written. Not for page-locked memory: it has its
    pages already, and the kernel refuses a driver's mappings.
    """
    if len(memory) < 16 * _PAGE or not _populates():
        return
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first, end = -(-start // _PAGE) * _PAGE, (start + len(memory)) // _PAGE * _PAGE
    _libc().madvise(first, end - first, MADV_POPULATE_WRITE)


def can_populate() -> bool:
    """Whether `populate` has an effect."""
    return _populates()


@cache
def _populates() -> bool:
    """Whether the kernel has MADV_POPULATE_WRITE. Tested with a new page, since EINVAL has other
    causes too."""
    with mmap.mmap(-1, _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        place = ctypes.c_char.from_buffer(page)
        refused = _libc().madvise(ctypes.addressof(place), _PAGE, MADV_POPULATE_WRITE)
        known = not refused or ctypes.get_errno() != errno.EINVAL
        del place  # the map cannot be closed while a pointer into it exists
        return known


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
    offsets = (ctypes.c_longlong, ctypes.c_longlong)
    library.sync_file_range.argtypes = (ctypes.c_int, *offsets, ctypes.c_uint)
    return library


def processor_flags(path: str = "/proc/cpuinfo") -> tuple[str, ...]:
    """The features that the kernel reports for the first processor, sorted: "avx2", "neon", …

    Empty where the kernel names none. They include some that no compiler uses.
    """
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in {"flags", "Features"}:  # x86, Arm
                return tuple(sorted(value.split()))
    return ()
