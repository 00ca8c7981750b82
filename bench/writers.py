"""Which writers are compared? `tensorserve pack`, tensorizer's writer, a copy of the same bytes.

Run as a module it does one job in a process of its own: a job on stdin, a line of JSON on stdout.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.usage import Usage

_SAMPLE_SECONDS = 0.02
_COPY_BYTES = 8 * 1024**2


@dataclass(frozen=True)
class WriteJob:
    """One write of the model in `source` (a Hugging Face directory, one safetensors file)."""

    writer: str
    source: str
    destination: str
    """A directory that is not there yet, or s3://bucket/prefix."""
    key_file: str | None = None

    @property
    def weights(self) -> Path:
        """The file with the tensors that are written."""
        return Path(self.source) / "model.safetensors"

    def to_json(self) -> str:
        """For the process that writes."""
        return json.dumps(asdict(self))


def pack(job: WriteJob) -> None:
    """`tensorserve pack`, with its manifest and small files. It ends with fsync by itself."""
    from tensorserve.config.access import access_for
    from tensorserve.config.settings import Settings
    from tensorserve.packing.key_file import prepare_key
    from tensorserve.packing.pack import pack

    environ = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    settings = Settings.from_environment(environ | {"TENSORSERVE_MODEL_URI": job.source})
    key, _ = prepare_key(Path(job.key_file) if job.key_file else None, None)
    pack(Path(job.source), job.destination, access=access_for(settings), key=key)


def tensorizer(job: WriteJob) -> None:
    """`TensorSerializer`, the writer that vLLM's own path uses too, from the mapped file.

    To S3 it writes a temporary file first: its `open_stream` cannot do otherwise.
    """
    from safetensors.torch import load_file
    from tensorizer import EncryptionParams, TensorSerializer, stream_io

    sealing = None
    if job.key_file:
        sealing = EncryptionParams(key=Path(job.key_file).read_bytes())
    tensors = load_file(job.weights)
    remote = "://" in job.destination
    if not remote:
        Path(job.destination).mkdir(parents=True)
    stream = stream_io.open_stream(
        f"{job.destination}/model.tensors",
        "wb+",
        **(_tensorizer_s3() if remote else {}),
    )
    serializer = TensorSerializer(stream, encryption=sealing)
    serializer.write_state_dict(tensors)
    serializer.close()
    if not remote:
        _sync(Path(job.destination) / "model.tensors")


def copy(job: WriteJob) -> None:
    """Copies the bytes: by reading and writing (no reflinks), or by boto3's transfer manager."""
    if "://" not in job.destination:
        target = Path(job.destination) / "model.safetensors"
        target.parent.mkdir(parents=True)
        with job.weights.open("rb") as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, _COPY_BYTES)
        _sync(target)
        return
    from bench.places import s3_client

    bucket, _, prefix = job.destination.removeprefix("s3://").partition("/")
    s3_client(os.environ).upload_file(str(job.weights), bucket, f"{prefix}/model.safetensors")


WRITERS: dict[str, Callable[[WriteJob], None]] = {
    "pack": pack,
    "tensorizer": tensorizer,
    "copy": copy,
}


def main() -> None:
    """Write as the job on stdin says; imports are not timed."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = WriteJob(**json.load(sys.stdin))
    _import(job)
    gc.collect()
    with Usage() as usage, _Own() as own:
        WRITERS[job.writer](job)
    found = {
        "seconds": usage.seconds,
        "cpu_seconds": usage.cpu_seconds,
        "peak_bytes": usage.peak_bytes,
        "own_peak_bytes": own.peak,
    }
    answer.write(json.dumps(found) + "\n")
    answer.flush()
    os._exit(0)


class _Own:
    """The peak of the process's memory above that at the start, without file pages.

    Mapped files are pages that the kernel can drop at any time; they are resident all the same and
    part of `peak_bytes`. Sampled 50 times a second.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._start = _own_bytes()
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Own:
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, _own_bytes() - self._start)


def _own_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def _import(job: WriteJob) -> None:
    names = [
        "safetensors.torch",
        "tensorizer",
        "tensorserve.bundle.tensors_file",
        "tensorserve.packing.pack",
    ]
    if "://" in job.destination:
        names += ["boto3", "bench.places", "tensorserve.packing.s3_upload"]
    for name in names:
        importlib.import_module(name)


def _tensorizer_s3() -> dict[str, object]:
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    return {
        "s3_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
        "s3_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        "s3_endpoint": endpoint,
        "s3_region_name": os.environ["AWS_REGION"],
        "force_http": endpoint.startswith("http://"),
    }


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
