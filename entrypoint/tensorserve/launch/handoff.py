"""How do secrets reach the engine and its workers? In a memfd of a parent process.

Inherited descriptors do not work: vLLM starts its workers with `spawn`, which closes them, and so
does supervisord. Environment variables and arguments can be read by other processes. So the payload
is in a sealed memfd of a process that outlives the readers, which open ``/proc/<pid>/fd/<n>``. The
kernel allows that to the same user and root only. Nothing is written to a disk, and the memory is
freed with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from typing import Any

from tensorserve.errors import TensorserveError

_REFERENCE = re.compile(r"/proc/\d+/fd/\d+")
_MAX_BYTES = 16 * 1024 * 1024


def publish(
    data: bytes | bytearray, name: str = "tensorserve", *, survives_exec: bool = True
) -> str:
    """Put `data` into a sealed memfd, and return its path for readers.

    The descriptor stays open (and so the path valid) as long as this process id lives, or until
    `withdraw`. Without `survives_exec`, programs that this process starts do not inherit it.
    """
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        # 0400: no reader can open it for writing.
        os.fchmod(fd, 0o400)
        os.set_inheritable(fd, survives_exec)
    except BaseException:
        os.close(fd)
        raise
    return f"/proc/{os.getpid()}/fd/{fd}"


def withdraw(reference: str) -> None:
    """Close what this process has published at `reference`. What readers have open stays.

    Raises TensorserveError for what is not of this process.
    """
    if holder(reference) != os.getpid():
        raise TensorserveError(f"{reference} is not of this process.")
    os.close(int(reference.rpartition("/")[2]))


def holder(reference: str) -> int:
    """The process whose memory `reference` names. Raises TensorserveError for another text."""
    if not _REFERENCE.fullmatch(reference):
        raise TensorserveError(f"The hand-over reference {reference!r} is not one of ours.")
    return int(reference.split("/")[2])


def publish_json(payload: dict[str, Any]) -> str:
    """`publish` of a JSON object."""
    return publish(json.dumps(payload).encode())


def receive_json(reference: str) -> dict[str, Any]:
    """The object that `publish_json` left at `reference`. Raises TensorserveError if it is gone."""
    holder(reference)
    try:
        with open(reference, "rb") as file:
            payload = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError) as error:
        raise TensorserveError(
            f"The settings could not be taken over from {reference}: {error}.",
            hint="The process that holds them ended, or runs as another user. Start again.",
        ) from error
    if not isinstance(payload, dict):
        raise TensorserveError(f"The hand-over at {reference} is not an object.")
    return payload
