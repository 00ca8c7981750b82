"""How does a .tensors file become tensors, in file order, while it is still being received?

Each connection is a thread that claims a job (scheduler.py), receives it span by span (receiver.py)
and assembles each span in the tensor's memory (assembler.py) while the rest arrives. The consumer
takes complete tensors in file order. Knows sources and the format, not vLLM.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from types import TracebackType

import torch

from tensorserve.format import FileKey, TensorRecord
from tensorserve.linux import run_on
from tensorserve.loading.assembler import Assembler
from tensorserve.loading.buffer_pool import tensor_of
from tensorserve.loading.byte_budget import ByteBudget
from tensorserve.loading.concurrency import Concurrency, remote_start
from tensorserve.loading.counters import LoadProgress
from tensorserve.loading.cpu_idle import CpuIdle
from tensorserve.loading.gpu_staging import GpuStaging
from tensorserve.loading.header_check import check_headers
from tensorserve.loading.load_memory import LoadMemory
from tensorserve.loading.pending_tensor import NO_MEMORY, PendingTensor
from tensorserve.loading.receiver import Receiver, strip_bytes
from tensorserve.loading.scheduler import Scheduler
from tensorserve.loading.span_table import TensorMemory
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Source

Placement = Callable[[TensorRecord], torch.Tensor | None]


@dataclass(frozen=True)
class LoadOptions:
    """How to load. `ahead_bytes` bounds the host memory: that of connections, and of tensors there
    that are not yet taken, or not yet copied to a device. The ring of a `GpuStaging` comes on top.
    """

    connections: int | None = None
    """None: as many as help."""
    ahead_bytes: int = DEFAULTS.ahead_bytes
    verify_hashes: bool = False
    """Whether each tensor must have the SHA-256 that its header or `digests` gives."""
    digests: Mapping[int, bytes] = field(default_factory=dict)
    """SHA-256 of tensors by their header's offset, from a manifest."""
    processors: frozenset[int] = field(default_factory=lambda: frozenset(os.sched_getaffinity(0)))
    """Those that the threads run on, whatever the caller is bound to."""
    headers_sha256: str | None = None
    """Hex, of all of the file's headers in file order, from a manifest."""
    left_out: tuple[TensorRecord, ...] = ()
    """The file's tensors that are not loaded. Where `headers_sha256` is given, their headers count
    for it, and are read by the same connections."""


class TensorStream:
    """Iterate over it: (record, tensor of the record's shape and dtype), in file order.

    A tensor is handed out only after every one of its chunks was authenticated. Use it as a context
    manager: leaving it ends all threads, also in the middle of a load. Errors of any thread are
    raised in the consumer, as they were raised there.

    Before the last tensor is handed out, the file's headers are compared with the manifest's digest
    or, where there is none and the source cannot pin a version, with a second read of them.

    `place` may give a tensor's final memory (uint8, contiguous, of the record's length): it is then
    filled there, without a copy and without counting for `ahead_bytes`.

    With `staging`, tensors are on its device, and `place` gives memory there. What the consumer
    asks of the device comes after their arrival. Where hashes are verified, each tensor comes
    together in host memory first. A tensor that is not `staged` stays in host memory, for example
    one of which the consumer takes a slice; one that `place` gives memory for is staged always.

    `paced`: where a short job for each connection waits complete for the consumer, no tensor is
    begun. That is for one that waits for other ranks: what it will not take soon would only fill
    the memory.
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
        staging: GpuStaging | None = None,
        staged: Callable[[TensorRecord], bool] = lambda _: True,
        check_whole: bool = True,
        paced: bool = False,
    ) -> None:
        self._source = source
        self._paced = paced
        self._check_whole = check_whole
        self._staging = staging
        self._staged = staged
        self._options = options
        self._place = place
        records, self._header_only = _with_headers(tuple(records), options)
        self._assembler = Assembler(
            source,
            key,
            progress,
            encrypted=encrypted,
            hashes=options.verify_hashes,
            digests=options.digests,
            staging=staging,
        )
        direct = not encrypted and staging is None
        # On the way to a device a span is a whole part where it can be: it is decrypted in the slot
        # from which it is copied.
        strip = strip_bytes(source.remote, direct) if staging is None else DEFAULTS.part_bytes
        # In vLLM's layout a tensor that stays in host memory otherwise may have its place.
        in_host = staging is None or options.verify_hashes
        in_host = in_host or any(not staged(r) and place(r) is None for r in records)
        self._memory = LoadMemory(
            options.ahead_bytes, strip, staging, whole=options.verify_hashes, in_host=in_host
        )
        self._concurrency = _concurrency(source, options, progress, self._memory.most_connections)
        job_bytes = partial(_job_bytes, progress, self._concurrency, source)
        self._scheduler: Scheduler[PendingTensor] = Scheduler(
            records,
            self._admit,
            room=lambda: self._memory.room(self._concurrency.after_next_step),
            longest=partial(job_bytes, DEFAULTS.long_job_seconds, DEFAULTS.job_bytes),
            shortest=partial(job_bytes, DEFAULTS.short_job_seconds, DEFAULTS.short_job_bytes),
            aligned=source.remote,
            strip_bytes=strip,
            placed_bytes=DEFAULTS.part_bytes if direct else strip,
        )
        self._receiver = Receiver(
            source,
            self._assembler,
            self._scheduler,
            progress,
            direct=direct,
            strip=strip,
            finished=self._complete,
            in_c=staging is None,
        )
        self._not_prepared = (r for r in records if r.header_offset not in self._header_only)
        self._next_tensors: deque[PendingTensor] = deque()
        """In file order, without memory. Only who claims a job uses these two."""
        self._prepare()
        self._admitted: SimpleQueue[PendingTensor | None] = SimpleQueue()
        """In file order; None: the load has stopped."""
        self._head: PendingTensor | None = None
        """The first one of them, if it was looked at before."""
        self._changed = threading.Condition()
        """Guards the budgets and counts. Notified when there may be room, or nothing more to do."""
        self._changes = 0
        """How often `_changed` was notified."""
        self._next_place: tuple[TensorRecord, torch.Tensor | None] | None = None
        """Of a tensor for which there is no room yet."""
        self._next_look = 0.0
        """When the next idle thread looks for a straggler; monotonic seconds."""
        self._consumer_waits = False
        """Whether the consumer waits for a tensor that is not complete."""
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._waiting_bytes = 0
        """Of tensors that are complete and not taken, where they count for `ahead_bytes`."""
        self._not_taken = len(records)
        self._incomplete = len(records)
        self._threads: list[threading.Thread] = []
        self._connections_started = 0

    def __enter__(self) -> TensorStream:
        # The prefetch process must not wait for blocks that this load leaves out.
        self._source.passed(min(self._scheduler.low_water(), self._source.size))
        self._start_connections()
        if self._options.connections is None:
            self._start(self._adapt, "tensorserve-load-adapt")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        until = time.monotonic() + DEFAULTS.join_seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if self._staging is not None:
            self._staging.close()

    def __iter__(self) -> Iterator[tuple[TensorRecord, torch.Tensor]]:
        while (tensor := self._next_tensor()) is not None:
            record = tensor.record
            shaped_one = _handed_over(tensor)
            yield record, shaped_one
            del shaped_one
            self._release_ahead(tensor)

    def take(self) -> tuple[TensorRecord, torch.Tensor] | None:
        """The next (record, tensor), which counts for `ahead_bytes` no more; None after the last.

        Waits for it. For a caller that bounds what it has taken, instead of iteration.
        """
        tensor = self._next_tensor()
        if tensor is None:
            return None
        taken = tensor.record, _handed_over(tensor)
        self._release_ahead(tensor)
        return taken

    @property
    def ready(self) -> bool:
        """Whether `take` would not wait for a tensor, or would raise an error."""
        if self._head is None:
            try:
                self._head = self._admitted.get_nowait()
            except Empty:
                return self._error is not None
        return self._error is not None or self._head is None or self._head.done.is_set()

    @property
    def headers(self) -> Mapping[int, bytes]:
        """{offset: header} of what was handed out, as they were read."""
        return self._assembler.headers.as_read

    def _next_tensor(self) -> PendingTensor | None:
        """The next one to be handed out, on its device; None after the last one."""
        while self._not_taken:
            tensor = self._next_complete()
            self._not_taken -= 1
            if not self._not_taken and self._check_whole:
                options = self._options
                check_headers(
                    self._source,
                    self._assembler.headers.as_read,
                    options.headers_sha256,
                    connections=options.connections,
                )
            if tensor.header_only:
                continue
            if self._staging is not None:
                self._staging.join(tensor.copied)
            return tensor
        return None

    def _release_ahead(self, tensor: PendingTensor) -> None:
        budget = self._memory.device if tensor.staged else self._memory.host
        with self._changed:
            self._waiting_bytes -= tensor.ahead_bytes
        self._release(budget, tensor.ahead_bytes)

    def _next_complete(self) -> PendingTensor:
        """Wait for the next tensor in file order. Raises what a thread has raised."""
        while (tensor := self._head or self._admitted.get()) is None:
            self._raise()
        self._head = None
        if not tensor.done.is_set():
            self._consumer_waits = True
            self._notify()
        while not tensor.done.wait(DEFAULTS.consumer_poll_seconds):
            self._raise()
            self._receiver.count()
        self._consumer_waits = False
        self._raise()
        return tensor

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # Threads --------------------------------------------------------------------------------------

    def _start(self, work: Callable[[], None], name: str) -> None:
        def guarded() -> None:
            try:
                run_on(self._options.processors)
                work()
            # Raised in the consumer's thread: also KeyboardInterrupt and such.
            except BaseException as error:  # noqa: BLE001
                if self._error is None:
                    self._error = error
                self._stop()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stop(self) -> None:
        self._stopped.set()
        self._admitted.put(None)
        self._receiver.stop()
        if self._staging is not None:
            self._staging.stop()
        self._notify(everybody=True)

    def _start_connections(self) -> None:
        while self._connections_started < self._concurrency.target and not self._stopped.is_set():
            number = self._connections_started
            self._connections_started += 1
            self._start(partial(self._connection, number), f"tensorserve-load-{number}")

    def _adapt(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause) and self._incomplete:
            pause = self._concurrency.step()
            self._start_connections()

    def _connection(self, number: int) -> None:
        idle = False
        while self._incomplete and not self._stopped.is_set():
            if number >= self._concurrency.target:
                self._stopped.wait(DEFAULTS.surplus_wait_seconds)
                continue
            seen = self._changes
            job = self._scheduler.claim(self._concurrency.target)
            looks = job is None and (not idle or self._may_look())
            if looks and self._stragglers_matter:
                job = self._scheduler.steal()
            if job is not None:
                idle = False
                self._notify()  # there may be a job for another connection as well
                try:
                    self._receiver.read(job)
                finally:
                    self._scheduler.end(job)
                if not self._source.long_requests:
                    self._source.passed(min(self._scheduler.low_water(), self._source.size))
            elif not looks or not self._receiver.hedge():
                idle = True
                self._wait(seen)

    def _may_look(self) -> bool:
        """Whether an idle thread looks at the others' jobs: one at a time does."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + DEFAULTS.idle_wait_seconds
        return True

    @property
    def _stragglers_matter(self) -> bool:
        """Whether the load waits for jobs that are running, rather than for room."""
        return self._scheduler.all_given_out or self._consumer_waits

    def _wait(self, seen: int) -> None:
        """Wait until something has changed since `seen`, or there may be a straggler."""
        seconds = DEFAULTS.room_wait_seconds
        if self._stragglers_matter:
            seconds = DEFAULTS.idle_wait_seconds
        with self._changed:
            if self._changes == seen and not self._stopped.is_set():
                self._changed.wait(seconds)

    def _notify(self, *, everybody: bool = False) -> None:
        """Wake all threads that wait, or one, which wakes the next one where it finds a job."""
        with self._changed:
            self._changes += 1
            if everybody:
                self._changed.notify_all()
            else:
                self._changed.notify()

    # Tensors --------------------------------------------------------------------------------------

    def _admit(self, record: TensorRecord) -> PendingTensor | None:
        """Set a tensor up; None where there is no room.

        Every tensor admitted before is given out wholly by then, so that the consumer can always
        take one and make room. Where no tensor is ahead, one of any size is admitted.
        """
        if (left_out := self._header_only.get(record.header_offset)) is not None:
            tensor = PendingTensor(left_out, header_only=True)
            self._admitted.put(tensor)
            return tensor
        if self._next_place is None or self._next_place[0] is not record:
            self._next_place = record, self._place(record)
        memory = self._next_place[1]
        staging = self._staging if memory is not None or self._staged(record) else None
        gathered = staging is not None and self._assembler.buffers.gathers(record)
        if gathered and not self._memory.in_host:
            self._memory.in_host = True  # as the file's first headers have shown
            if self._options.connections is None:
                self._concurrency.limit(self._memory.most_connections)
        ahead = record.length if memory is None else 0
        host = record.length if gathered else ahead if staging is None else 0
        device = ahead if staging is not None else 0
        with self._changed:
            enough = self._concurrency.target * DEFAULTS.short_job_bytes
            if self._paced and self._waiting_bytes >= enough:
                return None  # the consumer can take a tensor
            if not self._memory.take(host, device, self._concurrency.after_next_step):
                return None
        self._next_place = None
        tensor = self._prepared(record)
        tensor.ahead_bytes, tensor.staged = ahead, staging is not None
        tensor.memory = memory
        if staging is not None:
            tensor.memory = staging.memory(record.length) if memory is None else memory
            if gathered:
                tensor.gathered_bytes = record.length
                tensor.view = self._memory.pool.lend(record.length)
        elif memory is None:
            tensor.view = self._memory.pool.lend(record.length)
        elif record.length:
            tensor.view = memory.numpy().data
        if tensor.in_c is not None:
            tensor.in_c.put_into(tensor.view)
        self._admitted.put(tensor)
        return tensor

    def _prepared(self, record: TensorRecord) -> PendingTensor:
        """The tensor of `record`, without memory."""
        if not self._next_tensors:
            self._prepare()
        tensor = self._next_tensors.popleft()
        assert tensor.record is record
        return tensor

    def _prepare(self) -> None:
        """Make the next tensors, without memory. One at a time takes several times as long, all of
        it with Python's lock: other threads have filled the processor's caches meanwhile.
        """
        for record in islice(self._not_prepared, DEFAULTS.prepared_tensors):
            tensor = PendingTensor(record)
            if self._receiver.in_c and record.length:
                tensor.in_c = TensorMemory.to_come(record.length)
                self._assembler.expect_header(tensor)
            self._next_tensors.append(tensor)

    def _complete(self, tensor: PendingTensor) -> None:
        """A tensor is assembled and checked."""
        if self._staging is not None and tensor.memory is not None:
            tensor.view = NO_MEMORY  # it was copied to the device
        with self._changed:
            self._waiting_bytes += tensor.ahead_bytes
            self._incomplete -= 1
            last = not self._incomplete
        tensor.done.set()
        self._release(self._memory.host, tensor.gathered_bytes)
        if last:
            self._notify(everybody=True)

    def _release(self, budget: ByteBudget, count: int) -> None:
        if not count:
            return
        with self._changed:
            budget.give_back(count)
        if not self._scheduler.all_given_out:
            self._notify()


def _with_headers(
    records: tuple[TensorRecord, ...], options: LoadOptions
) -> tuple[tuple[TensorRecord, ...], dict[int, TensorRecord]]:
    """(records to read, in file order; {header offset: record} of those whose header alone is
    read).

    One pass over the file reads both, by the same connections and out of the same prefetched
    blocks, of which those that were passed are freed.
    """
    if options.headers_sha256 is None:
        return records, {}
    headers = [replace(record, length=0) for record in options.left_out]
    every = tuple(sorted([*records, *headers], key=lambda r: r.header_offset))
    return every, {record.header_offset: record for record in options.left_out}


def _concurrency(
    source: Source, options: LoadOptions, progress: LoadProgress, most: int
) -> Concurrency:
    if options.connections is not None:
        return Concurrency(options.connections, options.connections, progress.received_bytes)
    if source.remote:
        start = min(remote_start(len(options.processors)), most)
        most = min(DEFAULTS.most_connections, most)
    else:
        start = min(len(options.processors), most)
        most = min(DEFAULTS.local_connections_per_cpu * start, most)
    idle = CpuIdle(options.processors)
    return Concurrency(start, most, progress.received_bytes, idle=idle)


def _job_bytes(
    progress: LoadProgress, concurrency: Concurrency, source: Source, seconds: float, least: int
) -> int:
    """How long a job may be: on a fast link, what a connection brings in `seconds`."""
    if not source.long_requests:
        return least
    wanted = concurrency.rate(progress.received_bytes()) * seconds
    size = least
    while 2 * size <= min(wanted, DEFAULTS.most_job_bytes):
        size *= 2
    return size


def _handed_over(tensor: PendingTensor) -> torch.Tensor:
    memory = tensor_of(tensor.view) if tensor.memory is None else tensor.memory
    tensor.hand_over()
    return shaped(tensor.record, memory)


def shaped(record: TensorRecord, memory: torch.Tensor) -> torch.Tensor:
    """`memory` (uint8, of the record's length) as the tensor that it holds."""
    dtype = getattr(torch, record.dtype)
    if record.is_meta:
        # tensorizer gives zeros for a tensor that was on the meta device when it was written.
        return torch.zeros(record.shape, dtype=dtype)
    return memory.view(dtype).reshape(record.shape)
