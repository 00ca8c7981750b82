"""How does tensorizer's own TensorDeserializer read our sources (TENSORSERVE_LOADER=reference)?

tensorizer's code, which has run on many GPUs, decrypts, hashes and copies to the device. Ours is
what it reads: the source (retry, resume, one version), the checks of index and headers, the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType

import torch

from tensorserve.errors import ConfigurationError
from tensorserve.format import FileIndex, FileKey, TensorRecord, parse_header
from tensorserve.loading.counters import LoadProgress
from tensorserve.loading.gpu_staging import empty_host_cache
from tensorserve.loading.header_check import check_headers, small_reads
from tensorserve.loading.reference_reading import DamagedError, Load, ReferenceReading
from tensorserve.loading.stream import LoadOptions
from tensorserve.sources import Source


class ReferenceStream:
    """Iterate over it: (record, tensor on `device`), in file order; as with `TensorStream`.

    Use it as a context manager: leaving it ends all threads, also in the middle of a load. It uses
    one of tensorizer's readers, which cannot open our sources a second time. A damaged tensor is
    read once more.
    """

    def __init__(
        self,
        source: Source,
        index: FileIndex,
        records: Iterable[TensorRecord],
        *,
        key: FileKey | None,
        options: LoadOptions,
        progress: LoadProgress,
        device: torch.device | None = None,
    ) -> None:
        """`records`: of `index`, in its order.

        Raises ConfigurationError where tensorizer or its libsodium is missing.
        """
        _require(sodium=index.encrypted)
        place = _with_number(device or torch.device("cpu"))
        self._load = Load(source, index, key, options, progress, place)
        self._records = tuple(records)
        self._reading: ReferenceReading | None = None

    def __enter__(self) -> ReferenceStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._reading is not None:
            self._reading.close()
        if self._load.device.type == "cuda":
            # tensorizer's page-locked buffer, as large as the largest tensor.
            empty_host_cache()

    def __iter__(self) -> Iterator[tuple[TensorRecord, torch.Tensor]]:
        left = list(self._records)
        damaged: TensorRecord | None = None
        while left:
            with_data = [record for record in left if not record.is_meta]
            self._reading = reading = ReferenceReading(self._load, with_data, damaged)
            try:
                for record in tuple(left):
                    tensor = self._zeros(record) if record.is_meta else reading.take(record)
                    if len(left) == 1:
                        self._check_headers()
                    yield record, tensor
                    del tensor
                    if not record.is_meta:
                        reading.release(record)
                    left.pop(0)
            except DamagedError as error:
                if damaged is left[0]:
                    raise error.verdict from error.__cause__
                damaged = left[0]
                self._load.progress.retry("corrupt")
            finally:
                reading.close()

    def _zeros(self, record: TensorRecord) -> torch.Tensor:
        """What tensorizer gives for a tensor without data; only its header is read."""
        load = self._load
        data = load.source.read(record.header_offset, record.header_length)
        parse_header(record, data, encrypted=load.index.encrypted, source_name=load.source.name)
        load.headers[record.header_offset] = data
        return torch.zeros(record.shape, dtype=getattr(torch, record.dtype), device=load.device)

    def _check_headers(self) -> None:
        load = self._load
        expected, connections = load.options.headers_sha256, load.options.connections
        if expected is not None:
            self._read_other_headers()
        check_headers(load.source, load.headers, expected, connections=connections)

    def _read_other_headers(self) -> None:
        """Read the headers of tensors that are left out and that tensorizer has not read: those
        before the first tensor that is loaded, and after the last one.

        Only at the end: the prefetch process fetches a file's end only when all ranks have passed
        its beginning.
        """
        load = self._load
        left = [r for r in load.options.left_out if r.header_offset not in load.headers]

        def read(record: TensorRecord) -> None:
            data = load.source.read(record.header_offset, record.header_length)
            load.headers[record.header_offset] = data

        with small_reads(load.options.connections) as pool:
            for _ in pool.map(read, left):
                pass


def _require(*, sodium: bool) -> None:
    """Raises ConfigurationError where tensorizer is missing, or libsodium where it is needed."""
    try:
        from tensorizer import _crypt
    except ImportError as error:
        raise ConfigurationError(
            f"TENSORSERVE_LOADER=reference needs tensorizer, which cannot be imported: {error}.",
            hint="Install it, or set TENSORSERVE_LOADER=auto.",
        ) from error
    if sodium and not _crypt.available:
        raise ConfigurationError(
            "TENSORSERVE_LOADER=reference: tensorizer finds no libsodium to decrypt the file with.",
            hint="Install it (Debian: libsodium23), or set TENSORSERVE_LOADER=auto.",
        )


def _with_number(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
