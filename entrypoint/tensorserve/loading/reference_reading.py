"""How is one TensorDeserializer run: what does it read, and what becomes of its tensors?

Written for tensorizer 2.10.1 to 2.12.1 (tensorizer/serialization.py). Its private names are used
in this file only, except the one that tells whether libsodium was found (reference.py).
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
from tensorserve.format.byte_reader import DAMAGED_HINT
from tensorserve.linux import run_on
from tensorserve.loading.counters import LoadProgress
from tensorserve.loading.read_ahead import ReadAhead
from tensorserve.loading.reference_file import LoadEndedError, ReferenceFile
from tensorserve.loading.stream import LoadOptions
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import ReplacedError, Source
from tensorserve.telemetry.names import Stage

_PATH_MARK = b"\x1e"


@dataclass(frozen=True)
class Load:
    """A load: its file, its options and its device."""

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


class ReferenceReading:
    """One TensorDeserializer that reads `records`, which have data. `damaged`, the first of them,
    is read past all caches.
    """

    def __init__(
        self, load: Load, records: list[TensorRecord], damaged: TensorRecord | None
    ) -> None:
        self._load = load
        self._source, self._index, self._progress = load.source, load.index, load.progress
        self._damaged = damaged
        self._records = records
        self._wanted = {record.header_offset for record in records}
        self._limit = (
            load.options.ahead_bytes - load.options.ahead_bytes // DEFAULTS.reference_ahead_part
        )
        self._changed = threading.Condition()
        self._out = 0
        """Bytes of tensors that tensorizer has begun and the consumer has not released."""
        self._ended = False
        self._data_at: float | None = None
        """When tensorizer was given the last bytes of a tensor; monotonic seconds."""
        self._parameters = _decryption() if self._index.encrypted else None
        self._file: ReferenceFile | None = None
        self._ahead: ReadAhead | None = None
        self._deserializer: Any = None
        self._tensors: Any = None

    # Called in the consumer's thread -------------------------------------------------------------

    def take(self, record: TensorRecord) -> torch.Tensor:
        """The next tensor, which is that of `record`. Raises DamagedError, and TensorserveError
        for what tensorizer cannot read.
        """
        if self._tensors is None:
            self._begin()
        try:
            *_, name, parameter = next(self._tensors)
        except Exception as error:
            ours = self._as_ours(error, record)
            if ours is error:
                raise
            raise ours from error
        # tensorizer gives a Parameter that requires a gradient; weight loaders expect tensors.
        tensor: torch.Tensor = parameter.data
        found = name, str(tensor.dtype), tuple(tensor.shape)
        expected = _path(record), f"torch.{record.dtype}", record.shape
        if found != expected:
            raise self._unreadable(f"it gives {found} for {expected}")
        self._compare(record, tensor)
        if tensor.is_cuda:
            # tensorizer allocates it on a stream of its own. Its memory, once freed, might be
            # written while the consumer's stream still reads it. Not run on a GPU yet.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        if self._index.encrypted:
            self._progress.stage(Stage.DECRYPT, record.length, 0.0)
        return tensor

    def _compare(self, record: TensorRecord, tensor: torch.Tensor) -> None:
        """Compare a manifest's digest, which tensorizer does not know. Raises DamagedError."""
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
            self._file.end(DEFAULTS.join_seconds)
        if self._tensors is not None:
            self._tensors.close()
            self._deserializer.close()
            # It closes one of its two pools. The other one would live as long as an error whose
            # traceback refers to it.
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
            # Otherwise it initialises CUDA in a thread, on the first GPU, whichever this rank uses.
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
        # Lazy or not, it keeps every tensor that it has given.
        deserializer._cache = _NoCache()
        return deserializer

    def _head(self) -> bytes:
        """The bytes before the first header, which must be those that were parsed and checked."""
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
            return None  # the kernel reads local files ahead
        return ReadAhead(
            self._source,
            self._ranges(),
            self._progress,
            connections=self._load.options.connections or DEFAULTS.reference_connections,
            limit=self._load.options.ahead_bytes // DEFAULTS.reference_ahead_part,
            processors=self._load.options.processors,
        )

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of what is read, in order: of tensors that are left out, the headers."""
        first, last = self._records[0].header_offset, self._records[-1].header_offset
        for record in self._index.tensors:
            if not first <= record.header_offset <= last or record is self._damaged:
                continue
            wanted = record.header_offset in self._wanted
            yield record.header_offset, record.end if wanted else record.data_offset

    def _as_ours(self, error: Exception, record: TensorRecord) -> Exception:
        """The error to raise for one that tensorizer raised instead of giving a tensor."""
        from tensorizer.serialization import CryptographyError, HashMismatchError

        where = f"{self._source.name}: tensor {record.name!r} (offset {record.data_offset})"
        if isinstance(error, CryptographyError):
            found = "fails authentication: the key is another file's, or the bytes changed."
        elif isinstance(error, HashMismatchError):
            found = "does not have the hash that its header gives."
        elif isinstance(error, TensorserveError | RuntimeError | MemoryError):
            return error  # ours, or one of the device or of memory
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

    # Called in tensorizer's thread ---------------------------------------------------------------

    def _enter(self) -> None:
        """Give a thread of tensorizer's its processors and device. It starts on the processors
        that vLLM has bound the worker to, with the first GPU as its device: leaving a stream of
        another GPU would make a context on the first one.
        """
        run_on(self._load.options.processors)
        if self._load.device.type == "cuda":
            torch.cuda.set_device(self._load.device)

    def _header(self, record: TensorRecord) -> bytes:
        """A header, checked; waits while the consumer has too many tensors."""
        if self._data_at is not None:
            # What tensorizer does between two reads: decryption, hashes, copies to a GPU.
            if self._index.encrypted:
                self._progress.stage(Stage.DECRYPT, 0, time.monotonic() - self._data_at)
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
        """Parse a header, and set its key. Raises CorruptError, and the errors of the key."""
        header = parse_header(
            record, data, encrypted=self._index.encrypted, source_name=self._source.name
        )
        options = self._load.options
        if wanted and options.verify_hashes:
            # tensorizer does not check a tensor without a digest.
            require_digest(header, options.digests.get(record.header_offset))
        if wanted and header.chunks is not None:
            assert self._load.key is not None
            assert self._parameters is not None
            # tensorizer takes the key when it has the header, in this thread. So it derives no key
            # from a passphrase itself, with parameters that a forged file may give.
            self._parameters.key = self._load.key.for_header(header)

    def _data(self, record: TensorRecord, offset: int, buffer: memoryview) -> None:
        self._read(record, offset, buffer)
        if record is not self._damaged:
            self._progress.stage(Stage.FETCH, len(buffer), 0.0)
        self._data_at = time.monotonic()

    def _read(self, record: TensorRecord, offset: int, buffer: memoryview) -> None:
        if record is self._damaged:
            self._source.read_again(offset, buffer)
        elif self._ahead is not None:
            self._ahead.read_into(offset, buffer)
        else:
            began = time.monotonic()
            self._source.read_into(offset, buffer)
            self._progress.stage(Stage.FETCH, 0, time.monotonic() - began)

    def _wait_for_room(self, count: int) -> None:
        """Wait until `count` bytes fit: tensorizer's queue has no limit. A single tensor fits."""
        with self._changed:
            while self._out and self._out + count > self._limit and not self._ended:
                self._changed.wait()
            if self._ended:
                raise LoadEndedError("the load has ended")
            self._out += count


class _NoCache(dict[Any, Any]):
    """A cache that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keeps nothing."""


def _decryption() -> Any:
    """tensorizer's parameters, with a random key: each header sets its own."""
    from tensorizer import DecryptionParams

    return DecryptionParams.from_key(secrets.token_bytes(32))


def _path(record: TensorRecord) -> str | tuple[str | int, ...]:
    """tensorizer's name for it: a string, or the keys of its place in a nested state dict."""
    if record.raw_name.startswith(_PATH_MARK):
        path = tuple(json.loads(record.raw_name[1:]))
        return path[0] if len(path) == 1 and isinstance(path[0], str) else path
    return record.raw_name.decode()
