"""How does one TensorDeserializer get what it reads, and give what it makes of it?

Written for tensorizer 2.10.1 to 2.12.1 (tensorizer/serialization.py), whose private names stand
here alone, but for that of its cipher's presence (reference.py).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from tensorserve.errors import CorruptError, TensorserveError
from tensorserve.format import (
    FileIndex,
    FileKey,
    TensorHeader,
    TensorRecord,
    parse_header,
    require_digest,
    verify_hashes,
)
from tensorserve.format.bounded import DAMAGED_HINT
from tensorserve.linux import run_on
from tensorserve.loading.pipeline import LoadOptions
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.read_ahead import ReadAhead
from tensorserve.loading.reference_file import LoadEndedError, ReferenceFile
from tensorserve.sources import ReplacedError, Source

# Enough to hide a request's latency; who wants more sets TENSORSERVE_FETCH_CONNECTIONS.
_CONNECTIONS = 4
# The part of `ahead_bytes` for what is fetched ahead; the rest is for tensors not yet taken.
_AHEAD = 4
# A thread that is still in a read when all is done is left to its timeout.
_END_SECONDS = 0.5
_PATH_MARK = b"\x1e"


@dataclass(frozen=True)
class Load:
    """What is loaded, from where and how."""

    source: Source
    index: FileIndex
    key: FileKey | None
    options: LoadOptions
    progress: LoadProgress
    device: torch.device
    headers: dict[int, bytes] = field(default_factory=dict)
    """{offset: header}, as they come."""


class DamagedError(Exception):
    """A tensor came damaged; `verdict` is what to raise if it does so again."""

    def __init__(self, verdict: CorruptError) -> None:
        super().__init__(verdict.message)
        self.verdict = verdict


class Reading:
    """One TensorDeserializer at work on `records`, which have data; `damaged`, the first of them,
    is read anew.
    """

    def __init__(
        self, load: Load, records: list[TensorRecord], damaged: TensorRecord | None
    ) -> None:
        self._load = load
        self._source, self._index, self._progress = load.source, load.index, load.progress
        self._damaged = damaged
        self._records = records
        self._wanted = {record.header_offset for record in records}
        self._limit = load.options.ahead_bytes - load.options.ahead_bytes // _AHEAD
        self._changed = threading.Condition()
        self._out = 0
        """Bytes of tensors that tensorizer has begun and the consumer has not finished."""
        self._ended = False
        self._data_at: float | None = None
        """When the last of a tensor's bytes were given out; monotonic seconds."""
        self._parameters = _decryption() if self._index.encrypted else None
        self._file: ReferenceFile | None = None
        self._ahead: ReadAhead | None = None
        self._deserializer: Any = None
        self._tensors: Any = None

    # In the consumer's thread --------------------------------------------------------------------

    def take(self, record: TensorRecord) -> torch.Tensor:
        """The next tensor, which is `record`'s. Raises DamagedError, and TensorserveError for what
        tensorizer cannot read.
        """
        if self._tensors is None:
            self._begin()
        try:
            *_, name, parameter = next(self._tensors)
        except Exception as error:
            meant = self._meant(error, record)
            if meant is error:
                raise
            raise meant from error
        # A Parameter that wants a gradient: plain tensors are what weight loaders know.
        tensor: torch.Tensor = parameter.data
        found = name, str(tensor.dtype), tuple(tensor.shape)
        expected = _path(record), f"torch.{record.dtype}", record.shape
        if found != expected:
            raise self._unreadable(f"it gives {found} for {expected}")
        self._compare(record, tensor)
        if tensor.is_cuda:
            # tensorizer makes it on a stream of its own, where its memory would be filled anew as
            # soon as nobody names it, while the consumer's stream still reads. Not run on a GPU
            # yet.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        if self._index.encrypted:
            self._progress.stage("decrypt", record.length, 0.0)
        return tensor

    def _compare(self, record: TensorRecord, tensor: torch.Tensor) -> None:
        """A manifest's digest, which tensorizer knows nothing of. Raises DamagedError."""
        options = self._load.options
        digest = options.digests.get(record.header_offset)
        if not options.verify_hashes or digest is None:
            return
        plaintext = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            verify_hashes(self._parsed(record), plaintext, digest)
        except CorruptError as error:
            raise DamagedError(error) from error

    def _parsed(self, record: TensorRecord) -> TensorHeader:
        data = self._load.headers[record.header_offset]
        return parse_header(
            record, data, encrypted=self._index.encrypted, source_name=self._source.name
        )

    def release(self, record: TensorRecord) -> None:
        """The consumer is done with a tensor."""
        with self._changed:
            self._out -= record.length
            self._changed.notify_all()

    def close(self) -> None:
        """End all threads. May be called twice."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._ahead is not None:
            self._ahead.stop()
        if self._file is not None:
            self._file.end(_END_SECONDS)
        if self._tensors is not None:
            self._tensors.close()
            self._deserializer.close()
            # Of the two pools it closes one. The other would live as long as an error whose frames
            # name it.
            if self._deserializer._decryption_pool is not None:
                self._deserializer._decryption_pool.shutdown(wait=False)
        self._tensors = self._deserializer = None

    def _begin(self) -> None:
        self._file = ReferenceFile(
            self._index, self._head(), header=self._header, read=self._data, enter=self._enter
        )
        self._deserializer = self._deserialize(self._file)
        self._tensors = self._deserializer.read_tensors()
        self._ahead = self._read_ahead()

    def _deserialize(self, file: ReferenceFile) -> Any:
        from tensorizer import TensorDeserializer

        if self._load.device.type == "cuda":
            # Else it starts CUDA in a thread, always on the first GPU, whichever is this rank's.
            TensorDeserializer._preload_cuda_called = True
        wanted = {_path(record) for record in self._records}
        every = len(self._records) == len(self._index.tensors)
        try:
            deserializer = TensorDeserializer(
                file,
                device=self._load.device,
                filter_func=None if every else wanted.__contains__,
                lazy_load=True,
                num_readers=1,
                verify_hash=self._load.options.verify_hashes,
                encryption=self._parameters,
            )
        except TensorserveError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error
        # Lazy or not, it keeps every tensor that it ever gave.
        deserializer._cache = _Forgetful()
        return deserializer

    def _head(self) -> bytes:
        """The bytes before the first header: those that were parsed and checked, no others."""
        length = self._index.tensors[0].header_offset
        head = bytearray(self._source.read(0, length))
        if hashlib.sha256(head).hexdigest() != self._index.digest:
            self._source.read_again(0, memoryview(head))
        if hashlib.sha256(head).hexdigest() != self._index.digest:
            raise ReplacedError(
                f"{self._source.name} was replaced while it was read: its index is another one.",
                hint="Start again; upload models under a new name instead of over an old one.",
            )
        return bytes(head)

    def _read_ahead(self) -> ReadAhead | None:
        if not self._source.remote:
            return None  # the page cache is that memory
        return ReadAhead(
            self._source,
            self._ranges(),
            self._progress,
            connections=self._load.options.connections or _CONNECTIONS,
            limit=self._load.options.ahead_bytes // _AHEAD,
            processors=self._load.options.processors,
        )

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """What is read in order: tensorizer reads the headers of tensors that it passes over."""
        first, last = self._records[0].header_offset, self._records[-1].header_offset
        for record in self._index.tensors:
            if not first <= record.header_offset <= last or record is self._damaged:
                continue
            wanted = record.header_offset in self._wanted
            yield record.header_offset, record.end if wanted else record.data_offset

    def _meant(self, error: Exception, record: TensorRecord) -> Exception:
        """What an error that came instead of `record`'s tensor is to the consumer."""
        from tensorizer.serialization import CryptographyError, HashMismatchError

        where = f"{self._source.name}: tensor {record.name!r} (offset {record.data_offset})"
        if isinstance(error, CryptographyError):
            found = "fails authentication: the key is another file's, or the bytes changed."
        elif isinstance(error, HashMismatchError):
            found = "does not have the hash that its header gives."
        elif isinstance(error, TensorserveError | RuntimeError | MemoryError):
            return error  # ours, the device's or the machine's
        else:
            return self._unreadable(error)
        return DamagedError(CorruptError(f"{where} {found}", hint=DAMAGED_HINT))

    def _unreadable(self, error: object) -> TensorserveError:
        kind = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
        return TensorserveError(
            f"tensorizer {metadata.version('tensorizer')} cannot read {self._source.name}: "
            f"{kind}{str(error)[:500]}",
            hint="Its index and headers were checked before. TENSORSERVE_LOADER=auto reads it "
            "without tensorizer.",
        )

    # In tensorizer's thread ----------------------------------------------------------------------

    def _enter(self) -> None:
        """Its threads are made where vLLM has bound the worker, and know no device but the first:
        leaving a stream of another one would start CUDA on that.
        """
        run_on(self._load.options.processors)
        if self._load.device.type == "cuda":
            torch.cuda.set_device(self._load.device)

    def _header(self, record: TensorRecord) -> bytes:
        """A header that was checked; waits where the consumer is behind."""
        if self._data_at is not None:
            # What tensorizer does beside reading: opening what is left, hashes, the way to a GPU.
            if self._index.encrypted:
                self._progress.stage("decrypt", 0, time.monotonic() - self._data_at)
            self._data_at = None
        wanted = record.header_offset in self._wanted
        if wanted:
            self._wait_for_room(record.length)
        data = bytearray(record.header_length)
        self._read(record, record.header_offset, memoryview(data))
        try:
            self._check(record, data, wanted)
        except CorruptError:
            self._progress.retry("corrupt")
            self._source.read_again(record.header_offset, memoryview(data))
            self._check(record, data, wanted)
        self._load.headers[record.header_offset] = bytes(data)
        return bytes(data)

    def _check(self, record: TensorRecord, data: bytearray, wanted: bool) -> None:
        """Raises CorruptError as `parse_header` does, and what the key says."""
        header = parse_header(
            record, data, encrypted=self._index.encrypted, source_name=self._source.name
        )
        options = self._load.options
        if wanted and options.verify_hashes:
            # tensorizer passes over a tensor without a digest.
            require_digest(header, options.digests.get(record.header_offset))
        if wanted and header.chunks is not None:
            assert self._load.key is not None
            assert self._parameters is not None
            # tensorizer asks for the key when it has the header, in this thread. So a passphrase
            # is not its business, nor what a forged file asks of the derivation.
            self._parameters.key = self._load.key.for_header(header)

    def _data(self, record: TensorRecord, offset: int, buffer: memoryview) -> None:
        self._read(record, offset, buffer)
        if record is not self._damaged:
            self._progress.stage("fetch", len(buffer), 0.0)
        self._data_at = time.monotonic()

    def _read(self, record: TensorRecord, offset: int, buffer: memoryview) -> None:
        if record is self._damaged:
            self._source.read_again(offset, buffer)
        elif self._ahead is not None:
            self._ahead.read_into(offset, buffer)
        else:
            began = time.monotonic()
            self._source.read_into(offset, buffer)
            self._progress.stage("fetch", 0, time.monotonic() - began)

    def _wait_for_room(self, count: int) -> None:
        """Any size is let in where nothing is out. tensorizer's queue has no end of its own."""
        with self._changed:
            while self._out and self._out + count > self._limit and not self._ended:
                self._changed.wait()
            if self._ended:
                raise LoadEndedError("the load has ended")
            self._out += count


class _Forgetful(dict[Any, Any]):
    """A cache that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forgotten."""


def _decryption() -> Any:
    """tensorizer's parameters, with a key that opens nothing: each header brings its own."""
    from tensorizer import DecryptionParams

    return DecryptionParams.from_key(secrets.token_bytes(32))


def _path(record: TensorRecord) -> str | tuple[str | int, ...]:
    """What tensorizer calls it: a name, or the keys of a place in a nested state dict."""
    if record.raw_name.startswith(_PATH_MARK):
        path = tuple(json.loads(record.raw_name[1:]))
        return path[0] if len(path) == 1 and isinstance(path[0], str) else path
    return record.raw_name.decode()
