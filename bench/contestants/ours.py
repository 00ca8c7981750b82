"""This loader, used as a library: the one place of the bench that calls it."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from bench.contestants import Job, Loaded, synchronize

if TYPE_CHECKING:
    from tensorserve.loading import LoadProgress
    from tensorserve.opening import OpenTensors

# What the loader asks for at once (loading/schedule.py).
_RANGE = 8 * 1024**2


def prepare(job: Job) -> None:
    """Import everything that a load needs."""
    import tensorserve.loading
    import tensorserve.opening

    if job.options.get("loader") == "reference":
        import tensorizer  # noqa: F401

        import tensorserve.loading.reference
    if job.uri.startswith("s3://"):
        import botocore.auth
        import botocore.session  # noqa: F401

        import tensorserve.sources.s3  # noqa: F401


def load(job: Job) -> Loaded:
    """All tensors on the device (option `device`), or only their bytes (option `bytes_only`).

    Option `connections`: else automatic. Option `loader`: `reference` reads with tensorizer's own
    reader, as TENSORSERVE_LOADER=reference does.
    """
    import torch

    from tensorserve.loading import LoadOptions, LoadProgress, TensorStream
    from tensorserve.loading.staging import Staging

    if job.options.get("bytes_only"):
        return _read_only(job)
    progress = LoadProgress()
    opened = _open(job, progress)
    connections = job.options.get("connections")
    device = job.options.get("device", "cpu")
    load_options = LoadOptions(connections=connections)
    try:
        if job.options.get("loader") == "reference":
            from tensorserve.loading.reference import ReferenceStream

            stream: TensorStream | ReferenceStream = ReferenceStream(
                opened.source,
                opened.index,
                opened.index.tensors,
                key=opened.key,
                options=load_options,
                progress=progress,
                device=torch.device(device),
            )
        else:
            stream = TensorStream(
                opened.source,
                opened.index.tensors,
                encrypted=opened.index.encrypted,
                key=opened.key,
                options=load_options,
                progress=progress,
                # As the engine does for what goes on to a GPU.
                staging=Staging(torch.device(device), 128 * 1024**2)
                if device.startswith("cuda")
                else None,
            )
        with stream:
            tensors = {record.name: tensor for record, tensor in stream}
    finally:
        opened.source.close()
    synchronize(device)
    return Loaded(tensors)


def _read_only(job: Job) -> Loaded:
    """Our client alone: all ranges in file order, each into a buffer that is used again and again.

    What the link, the server and our client's own work allow: nothing is parsed, opened or placed.
    """
    opened = _open(job, None)
    offsets = iter(range(0, opened.source.size, _RANGE))
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        buffer = memoryview(bytearray(_RANGE))
        try:
            while not errors:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                length = min(_RANGE, opened.source.size - offset)
                opened.source.read_into(offset, buffer[:length])
        # Raised below, in the thread that waits.
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(job.options["connections"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.source.close()
    if errors:
        raise errors[0]
    return Loaded(None)


def _open(job: Job, observer: LoadProgress | None) -> OpenTensors:
    """The open file, its key proven, from the same settings as the engine's."""
    from tensorserve.opening import access_for, key_for, open_tensors
    from tensorserve.settings import Settings

    environ = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environ["TENSORSERVE_MODEL_URI"] = job.uri
    if job.key_file:
        environ["TENSORSERVE_KEY_FILE"] = job.key_file
    if "connections" in job.options:
        environ["TENSORSERVE_FETCH_CONNECTIONS"] = str(job.options["connections"])
    settings = Settings.from_environment(environ)
    return open_tensors(job.uri, access_for(settings), key_for(settings), observer=observer)
