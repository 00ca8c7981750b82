"""The way of the bytes: ranges → decrypted, authenticated → where each tensor belongs.

Each connection is a thread that takes a job (schedule.py) and receives it strip by strip; as soon
as one is there, the thread opens it into the tensor's own memory while the rest is on its way. The
consumer takes finished tensors in file order. Knows sources and the format, not vLLM.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from types import TracebackType

import torch

from tensorserve.format import FileKey, TensorRecord
from tensorserve.headers import check_headers
from tensorserve.linux import run_on
from tensorserve.loading.connections import REMOTE_MOST, Connections, remote_start
from tensorserve.loading.memory import HostMemory
from tensorserve.loading.opener import Opener, Pending
from tensorserve.loading.processors import Spare
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.reader import Reader, strip_bytes
from tensorserve.loading.room import Room
from tensorserve.loading.schedule import PART_BYTES, Schedule
from tensorserve.loading.staging import Staging
from tensorserve.sources import Source

_IDLE_SECONDS = 0.02
# For a connection that does not help at the moment.
_SURPLUS_SECONDS = 0.1
# For one that waits for room: it is told when there is some. What is late is not waited for longer.
_ROOM_SECONDS = 0.5
# Threads that are still in a read when all is done are left to their timeout.
_JOIN_SECONDS = 0.5
# The part of `ahead_bytes` for memory that waits to be used again.
_KEPT = 8

Placement = Callable[[TensorRecord], torch.Tensor | None]


@dataclass(frozen=True)
class LoadOptions:
    """How to load. ``ahead_bytes`` bounds the host memory: of connections, and of tensors there
    that are not yet taken or on their way to a device; the ring of a `Staging` comes on top.
    """

    connections: int | None = None
    """None: as many as help."""
    ahead_bytes: int = 1024**3
    verify_hashes: bool = False
    """Whether each tensor must have the SHA-256 that its header or `digests` gives."""
    digests: Mapping[int, bytes] = field(default_factory=dict)
    """SHA-256 of tensors by their header's offset, from a manifest."""
    processors: frozenset[int] = field(default_factory=lambda: frozenset(os.sched_getaffinity(0)))
    """That the threads run on, wherever the caller is bound to."""
    headers_sha256: str | None = None
    """Of all of the file's headers in file order, from a manifest."""
    left_out: tuple[TensorRecord, ...] = ()
    """The file's tensors that are not loaded; their headers count for that digest, and are read in
    passing where it is given."""


class TensorStream:
    """Iterate over it: (record, CPU tensor of the record's shape and dtype), in file order.

    A tensor is handed out only after every one of its chunks was authenticated. Use it as a context
    manager: leaving it ends all threads, also in the middle. Errors of any thread surface in the
    consumer, as they were raised.

    What holds of the file as a whole is compared before the last tensor is handed out: that its
    headers are those of the manifest or, where the source cannot pin a version and no manifest
    names the headers, that they still are what they were when they were read.

    `place` may give a tensor's final memory (uint8, contiguous, of the record's length): it is then
    filled there, without a copy and without counting for `ahead_bytes`.

    With `staging`, tensors come on its device, and `place` gives memory there. What the consumer
    asks of the device comes after their arrival. Where hashes are verified, each tensor comes
    together in host memory first. A tensor that is not `staged` stays in host memory: one of which
    the consumer takes a part, say. What `place` gives memory for is staged in any case.
    """

    def __init__(
        self,
        source: Source,
        records: Iterable[TensorRecord],
        *,
        encrypted: bool,
        key: FileKey | None,
        options: LoadOptions,
        progress: LoadProgress,
        place: Placement = lambda _: None,
        staging: Staging | None = None,
        staged: Callable[[TensorRecord], bool] = lambda _: True,
    ) -> None:
        self._source = source
        self._staging = staging
        self._staged = staged
        self._opener = Opener(
            source,
            key,
            progress,
            encrypted=encrypted,
            hashes=options.verify_hashes,
            digests=options.digests,
            staging=staging,
        )
        self._options = options
        self._progress = progress
        self._place = place
        records = tuple(records)
        # One pass over the file for both: by the same connections, out of the same memory of what
        # was fetched ahead, which keeps nothing that has gone by.
        self._header_only: dict[int, TensorRecord] = {}
        if options.headers_sha256 is not None:
            self._header_only = {record.header_offset: record for record in options.left_out}
            headers = [replace(record, length=0) for record in options.left_out]
            records = tuple(sorted([*records, *headers], key=lambda r: r.header_offset))
        direct = not encrypted and staging is None
        # On the way to a device a strip is a whole part where it can be: it is opened in the slot
        # from which it is sent.
        strip = strip_bytes(source.remote, direct) if staging is None else PART_BYTES
        # In vLLM's layout a tensor that stays in host memory otherwise may have its place.
        self._in_host = staging is None or options.verify_hashes
        self._in_host = self._in_host or any(not staged(r) and place(r) is None for r in records)
        self._memory = HostMemory(options.ahead_bytes // _KEPT)
        # With staging, the parts in which its job begins and ends may wait for another's.
        self._connection_bytes = strip + (2 * PART_BYTES if staging is not None else 0)
        most = self._most_connections()
        self._connections = _connections(source, options, progress, most)
        self._schedule: Schedule[Pending] = Schedule(
            records,
            self._admit,
            room=self._room,
            aligned=source.remote,
            strip_bytes=strip,
            placed_bytes=PART_BYTES if direct else strip,
        )
        self._reader = Reader(
            source,
            self._opener,
            self._schedule,
            progress,
            direct=direct,
            strip=strip,
            finished=self._finished,
        )
        self._order: SimpleQueue[Pending | None] = SimpleQueue()
        self._changed = threading.Condition()
        """There may be room, or nothing more to do: `_changes` has grown."""
        self._changes = 0
        self._host, self._device = Room(), Room()
        self._next_place: tuple[TensorRecord, torch.Tensor | None] | None = None
        """Of a tensor for which there is no room yet."""
        self._hungry = False
        """Whether the consumer waits for a tensor that is on its way."""
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._left = len(records)
        self._to_open = len(records)
        self._threads: list[threading.Thread] = []
        self._staffed = 0

    def __enter__(self) -> TensorStream:
        # What fetches ahead must not wait where the file begins with what is left out.
        self._source.passed(min(self._schedule.low_water(), self._source.size))
        self._staff()
        if self._options.connections is None:
            self._run(self._adapt, "tensorserve-load-adapt")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        until = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if self._staging is not None:
            self._staging.close()

    def __iter__(self) -> Iterator[tuple[TensorRecord, torch.Tensor]]:
        while self._left:
            pending = self._order.get()
            if pending is None:
                self._raise()
                continue
            if not pending.done.is_set():
                self._hungry = True
                self._tell()
            while not pending.done.wait(0.1):
                self._raise()
            self._hungry = False
            self._raise()
            self._left -= 1
            if not self._left:
                options = self._options
                check_headers(
                    self._source,
                    self._opener.headers,
                    options.headers_sha256,
                    connections=options.connections,
                )
            if pending.header_only:
                continue
            if self._staging is not None:
                self._staging.join(pending.sent)
            record = pending.record
            tensor = _shaped(record, pending.memory)
            room, budget = self._device if pending.staged else self._host, pending.budget
            pending.hand_over()
            del pending
            yield record, tensor
            del tensor
            self._release(room, budget)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # The crew -------------------------------------------------------------------------------------

    def _run(self, work: Callable[[], None], name: str) -> None:
        def guarded() -> None:
            try:
                run_on(self._options.processors)
                work()
            # The error belongs to the consumer, which raises it: also KeyboardInterrupt and such.
            except BaseException as error:  # noqa: BLE001
                if self._error is None:
                    self._error = error
                self._stop()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stop(self) -> None:
        self._stopped.set()
        self._order.put(None)
        self._reader.stop()
        if self._staging is not None:
            self._staging.stop()
        self._tell(everybody=True)

    def _staff(self) -> None:
        while self._staffed < self._connections.target and not self._stopped.is_set():
            number = self._staffed
            self._staffed += 1
            self._run(partial(self._work, number), f"tensorserve-load-{number}")

    def _adapt(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause) and self._to_open:
            pause = self._connections.step()
            self._staff()

    # In the worker threads ------------------------------------------------------------------------

    def _work(self, number: int) -> None:
        while self._to_open and not self._stopped.is_set():
            if number >= self._connections.target:
                self._stopped.wait(_SURPLUS_SECONDS)
                continue
            seen = self._changes
            job = self._schedule.claim(self._connections.target)
            if job is None and (self._schedule.all_given_out or self._hungry):
                job = self._schedule.steal()
            if job is not None:
                self._tell()  # there may be something to do for another one as well
                try:
                    self._reader.do(job)
                finally:
                    self._schedule.end(job)
                self._source.passed(min(self._schedule.low_water(), self._source.size))
            elif not self._reader.help():
                self._wait(seen)

    def _wait(self, seen: int) -> None:
        """Until something has changed since `seen`, or there may be something to steal."""
        left = self._schedule.all_given_out or self._hungry
        with self._changed:
            if self._changes == seen and not self._stopped.is_set():
                self._changed.wait(_IDLE_SECONDS if left else _ROOM_SECONDS)

    def _tell(self, *, everybody: bool = False) -> None:
        """One thread that waits, which tells the next where it finds something to do, or all."""
        with self._changed:
            self._changes += 1
            if everybody:
                self._changed.notify_all()
            else:
                self._changed.notify()

    def _admit(self, record: TensorRecord) -> Pending | None:
        """Set a tensor up; None where there is no room.

        Every tensor admitted before is given out to its end by then, so the consumer can always
        take one and make room. Where nothing is ahead, any size is let in.
        """
        if (left_out := self._header_only.get(record.header_offset)) is not None:
            nothing = memoryview(bytearray())
            pending = Pending(left_out, torch.empty(0), nothing, 0, header_only=True)
            self._order.put(pending)
            return pending
        if self._next_place is None or self._next_place[0] is not record:
            self._next_place = record, self._place(record)
        memory = self._next_place[1]
        to_device = memory is not None or self._staged(record)
        staging = self._staging if to_device else None
        gathered = staging is not None and self._opener.gathers(record)
        if gathered and not self._in_host:
            self._in_host = True  # as the file's first headers have shown
            if self._options.connections is None:
                self._connections.limit(self._most_connections())
        ahead = record.length if memory is None else 0
        host = record.length if gathered else ahead if staging is None else 0
        device = ahead if staging is not None else 0
        with self._changed:
            if not self._fits(host, device):
                return None
            self._host.take(host)
            self._device.take(device)
        self._next_place = None
        if memory is None:
            take = self._memory.take if staging is None else staging.memory
            memory = take(record.length)
        view = memoryview(bytearray())
        if record.length and (gathered or staging is None):
            view = (self._memory.take(record.length) if gathered else memory).numpy().data
        gathers = record.length if gathered else 0
        pending = Pending(record, memory, view, ahead, gathers, staged=staging is not None)
        self._order.put(pending)
        return pending

    def _fits(self, host: int, device: int) -> bool:
        limit = self._staging.ahead_bytes if self._staging is not None else 0
        return self._host.fits(host, self._host_room()) and self._device.fits(device, limit)

    def _room(self) -> int:
        """Bytes for tensors on their way."""
        if self._staging is None:
            return self._host_room()
        if self._options.verify_hashes:
            return min(self._host_room(), self._staging.ahead_bytes)
        return self._staging.ahead_bytes

    def _host_room(self) -> int:
        """Of the host's memory what the connections leave, at least half."""
        limit = self._options.ahead_bytes
        connections = self._connections.after_next_step * self._connection_bytes
        return max(limit // 2, limit - limit // _KEPT - connections)

    def _for_connections(self) -> int:
        """Bytes of host memory that they may take, all together."""
        limit, staging = self._options.ahead_bytes, self._staging
        if staging is None or self._in_host:
            return limit * 3 // 8
        # No tensors are in it. And half of the ring is for parts that come bit by bit.
        return limit - limit // _KEPT + staging.ring_bytes // 2

    def _most_connections(self) -> int:
        return max(4, self._for_connections() // self._connection_bytes)

    def _release(self, room: Room, count: int) -> None:
        if not count:
            return
        with self._changed:
            room.give_back(count)
        if not self._schedule.all_given_out:
            self._tell()

    def _finished(self, tensor: Pending) -> None:
        if self._staging is not None:
            tensor.view = memoryview(b"")  # all of it is sent
        with self._changed:
            self._to_open -= 1
            last = not self._to_open
        tensor.done.set()
        self._release(self._host, tensor.gathered)
        if last:
            self._tell(everybody=True)


def _connections(
    source: Source, options: LoadOptions, progress: LoadProgress, most: int
) -> Connections:
    if options.connections is not None:
        return Connections(options.connections, options.connections, progress.received_bytes)
    if source.remote:
        start, most = min(remote_start(len(options.processors)), most), min(REMOTE_MOST, most)
    else:
        start = min(len(options.processors), most)
        most = min(4 * start, most)
    spare = Spare(options.processors)
    return Connections(start, most, progress.received_bytes, spare=spare)


def _shaped(record: TensorRecord, memory: torch.Tensor) -> torch.Tensor:
    dtype = getattr(torch, record.dtype)
    if record.is_meta:
        # tensorizer gives zeros for a tensor that was on the meta device when it was written.
        return torch.zeros(record.shape, dtype=dtype)
    return memory.view(dtype).reshape(record.shape)
