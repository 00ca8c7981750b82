"""Which range of the file does a free connection read next?

A job is a range of the file that one connection reads in one request, in file order, whatever
tensors stand there. From a remote source jobs end at multiples of 8 MiB, or of 16, 32 or 64 on a
fast link: object stores keep an object in pieces of 4 MiB, 8 MiB or more, and a request that begins
or ends within one may have all of it read. Within a job, spans are received one by one: a part of
a large tensor, or small neighbours together. Towards the end jobs get shorter, a free connection
takes over the rest of another one's job, and what a straggler has not received is read a second
time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from tensorserve.format import TensorRecord
from tensorserve.loading.spans import Piece, Run, Span, Spans
from tensorserve.loading.tuning import DEFAULTS

# After every offset.
END = 2**63 - 1

Target = TypeVar("Target")


def straggler_threshold(average: float) -> float:
    """Seconds after which a read is a straggler, where reads take `average` seconds."""
    return max(DEFAULTS.straggler_seconds, DEFAULTS.straggler_factor * average)


def moving_average(average: float, latest: float) -> float:
    """`average`, exponentially weighted, with one more value."""
    return average + DEFAULTS.average_weight * (latest - average)


class Running(Protocol):
    """What knows how far a job is where C receives it."""

    @property
    def position(self) -> int:
        """How many of its spans are done."""

    @property
    def began(self) -> float:
        """When the span after these was begun; monotonic seconds."""

    def claim(self, number: int) -> bool:
        """Take span `number` for the caller's copy of it; False: it is taken."""

    def give_up(self, stop: int) -> bool:
        """Leave its spans from number `stop` on to another job; False where one is begun."""


@dataclass(eq=False, slots=True)
class Job(Generic[Target]):
    """What one connection reads: `spans` [`next`, `stop`), which are adjacent."""

    spans: Spans[Target]
    next: int
    """The span that is being received."""
    stop: int
    began: float = field(default_factory=lambda: time.monotonic())
    """When that span was begun; monotonic seconds."""
    hedged: bool = False
    """Whether another connection reads that span as well."""
    thread: int = field(default_factory=threading.get_ident)
    """The thread that reads the job."""
    first: int = 0
    """The number among `spans` of the first one that `running` counts."""
    running: Running | None = None

    def look(self) -> None:
        """Set `next` and `began` by what C has received meanwhile."""
        if self.running is None:
            return
        done = self.first + self.running.position
        if done != self.next:
            self.next, self.began, self.hedged = done, self.running.began, False

    @property
    def offset(self) -> int:
        """The offset in the file of the first byte that is still to be read."""
        return self.spans.offset(self.next) if self.next < len(self.spans) else END


class Scheduler(Generic[Target]):
    """Gives out jobs. Thread-safe.

    `admit(record)` makes of a tensor, in file order, what pieces name as their target; None where
    there is no room for it yet. It must not wait: no thread could claim or take over a job
    meanwhile. `room()`: bytes that all jobs together may have pending at the moment; beyond that
    `admit` gives None. `longest()`: bytes of a job while there is enough for all, `short_job_bytes`
    times a power of two; `shortest()`: the same towards the end. `aligned`: jobs end at multiples
    of their size in the file, else where a span ends. `strip_bytes`: the longest span;
    `placed_bytes`: the longest piece of a tensor's data, a divisor of `part_bytes`.
    """

    def __init__(
        self,
        records: Iterable[TensorRecord],
        admit: Callable[[TensorRecord], Target | None],
        room: Callable[[], int] = lambda: END,
        *,
        longest: Callable[[], int] = lambda: DEFAULTS.job_bytes,
        shortest: Callable[[], int] = lambda: DEFAULTS.short_job_bytes,
        aligned: bool = False,
        strip_bytes: int = DEFAULTS.part_bytes,
        placed_bytes: int = DEFAULTS.part_bytes,
    ) -> None:
        assert DEFAULTS.part_bytes % placed_bytes == 0
        self._strip_bytes = strip_bytes
        self._placed_bytes = placed_bytes
        self._todo = deque(records)
        self._bytes = self._bytes_left = sum(record.length for record in self._todo)
        self._admit = admit
        self._room = room
        self._longest = longest
        self._shortest = shortest
        self._aligned = aligned
        self._claiming = threading.Lock()
        self._lock = threading.Lock()
        self._running: list[Job[Target]] = []
        self._span_seconds = 0.0
        """Moving average from a span's begin to its end."""
        self._target: Target | None = None
        """Of the first tensor in _todo, where some of it is given out."""
        self._position = self._todo[0].header_offset if self._todo else END
        """The offset in the file of the first byte that is in no job yet."""

    def claim(self, connections: int) -> Job[Target] | None:
        """The next job where `connections` share the work.

        None when all is given out, or where there is no room for what comes next.
        """
        with self._claiming:
            # At the end each connection gets its share, so that none is left alone with a long job.
            # And all of them have to fit into the memory.
            left = max(self._bytes_left / connections, self._shortest())
            share = min(left, self._room() / DEFAULTS.job_room / connections)
            size = self._longest()
            whole = self._bytes / connections
            while size > DEFAULTS.job_bytes and DEFAULTS.long_job_share * size > whole:
                size //= 2
            while size > max(share, DEFAULTS.short_job_bytes):
                size //= 2
            spans = self._cut(size)
            if not spans:
                return None
            job = Job(spans, 0, len(spans))
            with self._lock:
                self._running.append(job)
                self._position = self._next_position(spans)
            return job

    @property
    def all_given_out(self) -> bool:
        """Whether no more jobs can be claimed, whatever the room."""
        return not self._todo

    def steal(self) -> Job[Target] | None:
        """The last spans of a job that are not begun: half of what the longest has left."""
        with self._lock:
            for each in self._running:
                each.look()
            victim = max(self._running, key=lambda j: j.stop - j.next, default=None)
            # The span at `next` is being received.
            left = victim.stop - victim.next - 1 if victim is not None else 0
            if victim is None or left < 1:
                return None
            waited, usual = time.monotonic() - victim.began, self._span_seconds
            if left == 1 and waited < DEFAULTS.steal_seconds:
                return None
            soon = 0 < left * usual < DEFAULTS.steal_least_seconds
            if soon and waited < DEFAULTS.straggler_factor * usual:
                return None
            middle = victim.stop - (left + 1) // 2
            running = victim.running
            if running is not None and not running.give_up(middle - victim.first):
                return None
            job = Job(victim.spans, middle, victim.stop)
            victim.stop = middle
            self._running.append(job)
            return job

    def straggler(self) -> tuple[Span[Target], int] | None:
        """(a span that takes longer than `straggler_threshold`, the thread that reads it); each
        span once.
        """
        now = time.monotonic()
        with self._lock:
            threshold = straggler_threshold(self._span_seconds)
            for job in self._running:
                job.look()
                if job.next < job.stop and not job.hedged and now - job.began > threshold:
                    job.hedged = True
                    span = job.spans[job.next]
                    if job.running is not None:
                        span.claim = partial(job.running.claim, job.next - job.first)
                    return span, job.thread
        return None

    def passed(self, job: Job[Target]) -> bool:
        """The span at `job.next` has arrived; False where no more of the job is left to it."""
        with self._lock:
            now = time.monotonic()
            self._span_seconds = moving_average(self._span_seconds, now - job.began)
            job.next += 1
            job.began = now
            job.hedged = False
            return job.next < job.stop

    def received_by(self, running: Running, job: Job[Target]) -> None:
        """C receives the job from now on; `passed` is not called for its spans.

        `running` counts from `job.next` on. What was taken over meanwhile it gives up.
        """
        with self._lock:
            job.first, job.running = job.next, running
            running.give_up(job.stop - job.first)

    def received(self, job: Job[Target], seconds: float) -> None:
        """All of such a job has come, within `seconds`."""
        with self._lock:
            job.look()
            if count := job.next - job.first:
                # As `count` times the same for `moving_average`.
                weight = 1 - (1 - DEFAULTS.average_weight) ** count
                self._span_seconds += weight * (seconds / count - self._span_seconds)

    def end(self, job: Job[Target]) -> None:
        """The job's connection is done with it."""
        with self._lock:
            self._running.remove(job)

    def low_water(self) -> int:
        """The first offset in the file that is still needed; `END` when nothing is."""
        with self._lock:
            for job in self._running:
                job.look()
            return min([self._position, *(job.offset for job in self._running)])

    def _next_position(self, spans: Spans[Target]) -> int:
        if not self._todo:
            return END
        if self._target is None:
            return self._todo[0].header_offset
        return spans.last.end

    def _cut(self, size: int) -> Spans[Target]:
        """The next `size` bytes or so; empty where not even the first tensor has room."""
        spans: Spans[Target] = Spans()
        limit = END
        while self._todo:
            record = self._todo[0]
            position = spans.last.end if spans else self._position
            if self._target is None:
                gap = record.header_offset - position if spans else 0
                if gap > DEFAULTS.gap_bytes:
                    break
                self._target = self._admit(record)
                if self._target is None:
                    break
                if gap:
                    spans.add(Span(position, gap, [], small=False))
                position = record.header_offset
            if not spans:
                limit = (position // size + 1) * size if self._aligned else position + size
            before = max(position, record.data_offset)
            for part in self._parts(record, self._target, position, limit):
                self._add(spans, record, part)
            end = spans.last.end
            self._bytes_left -= max(0, end - before)
            if end == record.end:
                self._todo.popleft()
                self._target = None
            if end >= limit:
                break
        return spans

    def _parts(
        self, record: TensorRecord, target: Target, position: int, limit: int
    ) -> Iterator[Piece[Target] | Run[Target]]:
        """Of one tensor, from `position` in the file to `limit`, or to where a span ends there."""
        stop = min(record.end, limit)
        # A header, too, may be longer than a span.
        while position < min(stop, record.data_offset):
            end = min(record.data_offset, position + self._strip_bytes)
            if self._aligned:
                end = min(end, limit)
            yield Piece(target, position - record.header_offset, end - position, header=True)
            position = end
        if position < stop:
            start, size = position - record.data_offset, self._placed_bytes
            within = stop - record.data_offset
            if not self._aligned:
                within = min(-(-within // size) * size, record.length)
            if record.length > DEFAULTS.small_bytes:
                yield Run(position, target, start, within, size)
            else:
                yield Piece(target, start, within - start, header=False)

    def _add(
        self, spans: Spans[Target], record: TensorRecord, part: Piece[Target] | Run[Target]
    ) -> None:
        """To the last span, where both are small; else in one of its own."""
        if isinstance(part, Run):
            spans.add(part)
            return
        offset = part.start + (record.header_offset if part.header else record.data_offset)
        small = record.length <= DEFAULTS.small_bytes
        last = spans.last if spans else None
        most = self._strip_bytes
        if isinstance(last, Span) and small and last.small and last.length + part.length <= most:
            last.pieces.append(part)
            last.length += part.length
        else:
            spans.add(Span(offset, part.length, [part], small))
