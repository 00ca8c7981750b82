"""This loader, used as a library: the one place of the bench that calls it."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from bench.contestants import Job, Loaded, synchronize

if TYPE_CHECKING:
    from tensorserve.bundle.tensors_file import OpenTensors
    from tensorserve.loading import LoadProgress, TensorStream
    from tensorserve.loading.reference import ReferenceStream

# The size of one request (`job_bytes` in loading/tuning.py).
_RANGE = 8 * 1024**2


def prepare(job: Job) -> None:
    """Import everything that a load needs."""
    if "part_bytes" in job.options:
        # A constant of the loader: to be changed before the modules that take it are imported.
        from dataclasses import replace

        from tensorserve.loading import tuning

        tuning.DEFAULTS = replace(tuning.DEFAULTS, part_bytes=job.options["part_bytes"])
    import tensorserve.bundle.tensors_file
    import tensorserve.loading.stream

    if job.options.get("loader") == "reference":
        import tensorizer  # noqa: F401

        import tensorserve.loading.reference
    if job.uri.startswith("s3://"):
        import botocore.auth
        import botocore.session  # noqa: F401

        import tensorserve.sources.s3  # noqa: F401


def load(job: Job) -> Loaded:
    """All tensors on the device (option `device`), or only their bytes (option `bytes_only`).

    Option `connections`: else automatic. Option `ring`: bytes of host memory that all goes through,
    as the engine does for a GPU. Option `processors`: that the threads may run on. Option `share`:
    (number, of how many): every so-manieth tensor only. Option `loader`: `reference` reads with
    tensorizer's own reader, as TENSORSERVE_LOADER=reference does.
    """
    from tensorserve.loading import LoadProgress

    if job.options.get("bytes_only"):
        return _read_only(job)
    began = time.perf_counter()
    progress = LoadProgress()
    opened = _open(job, progress)
    ready = time.perf_counter()
    try:
        stream = _stream(job, opened, progress)
        made = time.perf_counter()
        with stream:
            tensors = {record.name: tensor for record, tensor in stream}
    finally:
        opened.source.close()
    synchronize(job.options.get("device", "cpu"))
    parts = {"open": ready - began, "ring": made - ready, "load": time.perf_counter() - made}
    return Loaded(tensors, parts=parts)


def _stream(
    job: Job, opened: OpenTensors, progress: LoadProgress
) -> TensorStream | ReferenceStream:
    import torch

    from tensorserve.loading import LoadOptions, TensorStream
    from tensorserve.loading.gpu_staging import GpuStaging

    device, ring = torch.device(job.options.get("device", "cpu")), job.options.get("ring")
    number, count = job.options.get("share", (0, 1))
    records = opened.index.tensors[number::count]
    processors = frozenset(job.options.get("processors", os.sched_getaffinity(0)))
    options = LoadOptions(connections=job.options.get("connections"), processors=processors)
    if job.options.get("loader") == "reference":
        from tensorserve.loading.reference import ReferenceStream

        return ReferenceStream(
            opened.source,
            opened.index,
            records,
            key=opened.key,
            options=options,
            progress=progress,
            device=device,
        )
    return TensorStream(
        opened.source,
        records,
        encrypted=opened.index.encrypted,
        key=opened.key,
        options=options,
        progress=progress,
        staging=None if ring is None else GpuStaging(device, ring, processors=processors),
    )


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
    from tensorserve.bundle.tensors_file import open_tensors
    from tensorserve.config.access import access_for, key_for
    from tensorserve.config.settings import Settings

    environ = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environ["TENSORSERVE_MODEL_URI"] = job.uri
    if job.key_file:
        environ["TENSORSERVE_KEY_FILE"] = job.key_file
    if job.options.get("connections"):
        environ["TENSORSERVE_FETCH_CONNECTIONS"] = str(job.options["connections"])
    settings = Settings.from_environment(environ)
    return open_tensors(job.uri, access_for(settings), key_for(settings), observer=observer)
