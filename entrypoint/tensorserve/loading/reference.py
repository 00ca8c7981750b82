"""A second way to read: tensorizer's own TensorDeserializer, over our sources.

For TENSORSERVE_LOADER=reference. It opens, hashes and copies to the device with tensorizer's code,
which others have run on many GPUs; ours is only what comes in: the source (retry, resume, one
version), the checks of index and headers, and the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType

import torch

from tensorserve.errors import ConfigurationError
from tensorserve.format import FileIndex, FileKey, TensorRecord, parse_header
from tensorserve.headers import check_headers, small_reads
from tensorserve.loading.pipeline import LoadOptions
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.reference_reading import DamagedError, Load, Reading
from tensorserve.loading.staging import empty_host_cache
from tensorserve.sources import Source


class ReferenceStream:
    """Iterate over it: (record, tensor on `device`), in file order; as with `TensorStream`.

    Use it as a context manager: leaving it ends all threads, also in the middle. One reader of
    tensorizer's: it cannot open our sources a second time. What looks damaged is read once more.
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
        self._reading: Reading | None = None

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
            # tensorizer's buffer, as large as the largest tensor.
            empty_host_cache()

    def __iter__(self) -> Iterator[tuple[TensorRecord, torch.Tensor]]:
        left = list(self._records)
        damaged: TensorRecord | None = None
        while left:
            with_data = [record for record in left if not record.is_meta]
            self._reading = reading = Reading(self._load, with_data, damaged)
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
        """What tensorizer gives for a tensor without data, by `TensorStream`'s way: nothing is read
        for it.
        """
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
        """Of what is left out, those that tensorizer has not passed over: it reads none before the
        first tensor that is wanted, nor after the last.

        Only now: what fetches ahead brings a file's end only when all ranks are past its beginning.
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
    """Raises ConfigurationError where tensorizer is missing, or `sodium`, with which it opens."""
    try:
        from tensorizer import _crypt
    except ImportError as error:
        raise ConfigurationError(
            f"TENSORSERVE_LOADER=reference needs tensorizer, which cannot be imported: {error}.",
            hint="Install it, or set TENSORSERVE_LOADER=auto.",
        ) from error
    if sodium and not _crypt.available:
        raise ConfigurationError(
            "TENSORSERVE_LOADER=reference: tensorizer finds no libsodium to open the file with.",
            hint="Install it (Debian: libsodium23), or set TENSORSERVE_LOADER=auto.",
        )


def _with_number(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
