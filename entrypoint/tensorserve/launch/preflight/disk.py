"""Is there room in shared memory and in the state directory?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tensorserve.errors import ConfigurationError
from tensorserve.launch.preflight.results import Passed
from tensorserve.telemetry import Check

MIB = 1024**2
# vLLM's message queues between its processes, measured on 0.32.0 (CPU build): less ends in SIGBUS.
SHARED_MEMORY_BYTES = 160 * MIB
SHARED_MEMORY = Path("/dev/shm")
# Event log, configuration and tokenizer of large models.
STATE_BYTES = 64 * MIB


def check_shared_memory(path: Path = SHARED_MEMORY) -> Passed:
    """/dev/shm has room for vLLM's queues; a container gets 64 MiB unless told otherwise."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}; vLLM needs shared memory.") from error
    if free < SHARED_MEMORY_BYTES:
        raise ConfigurationError(
            f"{path} has {free // MIB} MiB free, vLLM needs {SHARED_MEMORY_BYTES // MIB} MiB.",
            hint="Start the container with `--shm-size 1g` (or `--ipc host`); on Kubernetes, mount "
            "an emptyDir of `medium: Memory` there.",
        )
    return Passed(Check.SHARED_MEMORY, f"{free // MIB} MiB free")


def check_state_dir(path: Path) -> Passed:
    """The state directory belongs to this user, is private and writable."""
    prepare_state_dir(path)
    free = shutil.disk_usage(path).free
    if free < STATE_BYTES:
        raise ConfigurationError(
            f"{path} has {free // MIB} MiB free, {STATE_BYTES // MIB} MiB are needed.",
            hint="Give the tmpfs more room, or set TENSORSERVE_STATE_DIR.",
        )
    return Passed(Check.STATE_DIRECTORY, f"{path}, {free // MIB} MiB free")


def prepare_state_dir(path: Path) -> None:
    """Make `path` (0700). Raises ConfigurationError for another user's, or an unwritable one."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
        if path.is_symlink() or info.st_uid != os.getuid():
            raise ConfigurationError(
                f"{path} belongs to another user or is a link.",
                hint="Set TENSORSERVE_STATE_DIR to a directory of your own.",
            )
        path.chmod(0o700)
        probe = path / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}.",
            hint="Mount a tmpfs there, or set TENSORSERVE_STATE_DIR to a writable directory.",
        ) from error
