"""In which pieces is a .tensors file read: which job does a free connection get next?

Jobs are taken in file order. A large tensor is cut into parts of 2 MiB, and a job is a run of
them; small neighbours are one job. Towards the end jobs get shorter, and a free connection takes
the rest of another's job: one slow connection delays nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tensorserve.format import TensorRecord

# tensorizer's cipher chunks have this size, so that a part can be opened when it is there.
PART_BYTES = 2 * 1024**2
# A request's latency is small beside it (8 MiB at S3's 90 MB/s a connection take 90 ms).
JOB_PARTS = 4
# Not less: what is left of a slow one's job is taken by others (`steal`).
_LEAST_PARTS = 2
# A job with one part to come is left alone for so long: a second request costs more than it saves.
_PATIENCE = 0.5
# Smaller neighbours are read in one request.
BATCH_BYTES = 4 * 1024**2
_BATCH_GAP = 64 * 1024

# After every offset.
END = 2**63 - 1

Target = TypeVar("Target")


@dataclass(eq=False, slots=True)
class Job(Generic[Target]):
    """What one connection does: parts [`next`, `stop`) of one tensor, or a batch of whole ones."""

    tensors: tuple[Target, ...]
    data_offset: int
    """Of the (first) tensor in the file."""
    place: int
    """Where the next byte that it reads stands in the file."""
    next: int = 0
    stop: int = 0
    batch: bool = False
    began: float = field(default_factory=time.monotonic)
    """When the part that is on its way was begun; monotonic seconds."""
    doubled: bool = False
    """Whether another connection reads the part on its way as well."""


class Schedule(Generic[Target]):
    """Gives out jobs. Thread-safe.

    `admit` makes of tensors, in file order, what the jobs name as their targets; it may block.
    `room`: bytes that all jobs together may have on their way; beyond that `admit` would block.
    """

    def __init__(
        self,
        records: Iterable[TensorRecord],
        admit: Callable[[tuple[TensorRecord, ...]], tuple[Target, ...]],
        room: int = END,
    ) -> None:
        self._todo = deque(records)
        self._bytes_left = sum(record.length for record in self._todo)
        self._admit = admit
        self._room = room
        self._claiming = threading.Lock()
        self._lock = threading.Lock()
        self._running: list[Job[Target]] = []
        self._cut: tuple[tuple[Target, ...], int] | None = None
        """Of the first tensor in _todo, where it is begun: its target, and the next part."""
        self._unclaimed = self._todo[0].header_offset if self._todo else END

    def claim(self, connections: int) -> Job[Target] | None:
        """The next job where `connections` share the work; None when all is given out."""
        with self._claiming:
            if not self._todo:
                return None
            record = self._todo[0]
            if record.length <= BATCH_BYTES:
                job = Job(
                    self._admit(self._batch()), record.data_offset, record.header_offset, batch=True
                )
                return self._begin(job)
            target, part = self._cut or (self._admit((record,)), 0)
            parts = -(-record.length // PART_BYTES)
            # At the end each connection gets its share, so that none is left alone with a long job.
            share = min(self._bytes_left, self._room) // (connections * PART_BYTES)
            stop = min(parts, part + max(_LEAST_PARTS, min(JOB_PARTS, share)))
            self._bytes_left -= (stop - part) * PART_BYTES
            self._cut = (target, stop)
            if stop == parts:
                self._todo.popleft()
                self._cut = None
            place = record.data_offset + part * PART_BYTES if part else record.header_offset
            return self._begin(Job(target, record.data_offset, place, part, stop))

    def steal(self) -> Job[Target] | None:
        """The last parts of a job that has not come to them: half of what the longest has left."""
        with self._lock:
            victim = max(self._running, key=lambda j: j.stop - j.next, default=None)
            # The part at `next` is on its way.
            left = victim.stop - victim.next - 1 if victim is not None else 0
            if victim is None or left < 1:
                return None
            if left == 1 and time.monotonic() - victim.began < _PATIENCE:
                return None
            middle = victim.stop - (left + 1) // 2
            place = victim.data_offset + middle * PART_BYTES
            job = Job(victim.tensors, victim.data_offset, place, middle, victim.stop)
            victim.stop = middle
            self._running.append(job)
            return job

    def double(self, older_than: float) -> tuple[Target, int] | None:
        """A part that has been on its way for that many seconds, to be read a second time."""
        now = time.monotonic()
        with self._lock:
            for job in self._running:
                if not job.batch and not job.doubled and now - job.began > older_than:
                    job.doubled = True
                    return job.tensors[0], job.next
        return None

    def passed(self, job: Job[Target]) -> bool:
        """The part at `job.next` has arrived; False where the rest of the job is another's."""
        with self._lock:
            job.next += 1
            job.place = job.data_offset + job.next * PART_BYTES
            job.began = time.monotonic()
            job.doubled = False
            return job.next < job.stop

    def end(self, job: Job[Target]) -> None:
        """The job's connection is done with it."""
        with self._lock:
            self._running.remove(job)

    def low_water(self) -> int:
        """The first offset in the file that is still needed; a huge one when nothing is."""
        with self._lock:
            return min([self._unclaimed, *(job.place for job in self._running)])

    def _begin(self, job: Job[Target]) -> Job[Target]:
        with self._lock:
            self._running.append(job)
            if self._cut is not None:
                self._unclaimed = self._todo[0].data_offset + self._cut[1] * PART_BYTES
            else:
                self._unclaimed = self._todo[0].header_offset if self._todo else END
        return job

    def _batch(self) -> tuple[TensorRecord, ...]:
        first = self._todo.popleft()
        batch = [first]
        self._bytes_left -= first.length
        while self._todo:
            record = self._todo[0]
            if (
                record.end - first.header_offset > BATCH_BYTES
                or record.header_offset - batch[-1].end > _BATCH_GAP
            ):
                break
            self._bytes_left -= record.length
            batch.append(self._todo.popleft())
        return tuple(batch)
