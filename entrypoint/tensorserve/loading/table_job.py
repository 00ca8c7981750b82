"""How is a job planned for C, and what became of it counted?"""

from __future__ import annotations

import threading
from collections.abc import Callable

from tensorserve.loading.assembler import Assembler
from tensorserve.loading.counters import LoadProgress
from tensorserve.loading.pending_tensor import PendingTensor
from tensorserve.loading.scheduler import Job
from tensorserve.loading.span_table import Caller, SpanTable, TensorMemory
from tensorserve.loading.spans import Piece, Run, Span
from tensorserve.telemetry.names import Stage


class TableJob:
    """One job's `SpanTable`. One thread reads it; others may call `count` and `stop`."""

    def __init__(
        self,
        job: Job[PendingTensor],
        buffer: memoryview,
        assembler: Assembler,
        progress: LoadProgress,
        *,
        placed: bool,
        assemble: Callable[[Span[PendingTensor], memoryview], None],
        finished: Callable[[PendingTensor], None],
    ) -> None:
        """`placed`: large tensors are received in their own memory. `assemble`: by Python, for
        spans with headers. `finished` is called with each tensor that has become complete.
        """
        self.offset = job.offset
        self._buffer = buffer
        self._assembler = assembler
        self._progress = progress
        self._assemble = assemble
        self._finished = finished
        self._counted = 0
        self._counting = threading.Lock()
        self._by_python: dict[int, Span[PendingTensor]] = {}
        """Spans with headers, by their number; C may assemble them nevertheless."""
        self._tensors: list[tuple[int, PendingTensor, TensorMemory]] = []
        """(first row, of what, its memory), in the order of rows. C looks at the memory's
        structure as long as the table is used.
        """
        self.table = self._planned(job, placed)

    def stop(self) -> None:
        """End at the next span."""
        self.table.stop()

    def count(self) -> None:
        """Look at what has come since the last time."""
        with self._counting:
            events = self.table.events(self._counted)
            self._counted += len(events)
            for number in events:
                tensor = next(tensor for row, tensor, _ in reversed(self._tensors) if row <= number)
                if self._assembler.taken(tensor, self.table.rows[number]):
                    self._finished(tensor)

    def report(self, seconds: float) -> None:
        """Add to the stages' bytes and time, once the job is over after `seconds`."""
        position = self.table.position
        fetched, opened = self.table.taken
        fetched += sum(
            span.data_bytes
            for number, span in self._by_python.items()
            if number < position and self.table.spans[number].call == Caller.PYTHON
        )
        opening = self.table.opening_seconds
        self._progress.stage(Stage.FETCH, fetched, max(0.0, seconds - opening))
        if opened:
            self._progress.stage(Stage.DECRYPT, opened, opening)

    def _called(self, number: int) -> None:
        """A span has come with headers that C does not take."""
        if self.table.spans[number].mine:
            span = self._by_python[number]
            self._assemble(span, self._buffer[: span.length])

    def _planned(self, job: Job[PendingTensor], placed: bool) -> SpanTable:
        """Where the bytes go."""
        stop = job.stop  # another connection may take over the rest at any moment
        parts = list(job.spans.parts(job.next, stop))
        rows = sum(part.count if isinstance(part, Run) else len(part.pieces) for _, part in parts)
        length = parts[-1][1].end - self.offset
        table = SpanTable.of_bytes(stop - job.next, length, rows, self._buffer, self._called)
        row = 0
        for first, part in parts:
            number = first - job.next
            if isinstance(part, Run):
                memory = self._memory(row, part.target)
                place = part.start, part.stop
                table.run(number, row, memory, place, part.size, direct=placed)
                row += part.count
            else:
                row = self._plan_span(table, number, part, row)
        return table

    def _plan_span(self, table: SpanTable, number: int, span: Span[PendingTensor], row: int) -> int:
        """Gives the number of the next row."""
        state = table.spans[number]
        state.length, state.first_row = span.length, row
        headers = [piece for piece in span.pieces if piece.header]
        if headers:
            self._by_python[number] = span
            if not all(map(_may_be_taken, headers)):
                state.call = Caller.PYTHON
                return row
            state.call = Caller.C_IF_EXPECTED
        state.rows = len(span.pieces)
        for at, piece in enumerate(span.pieces, row):
            planned = table.rows[at]
            planned.t = self._memory(at, piece.target).address
            planned.start, planned.length = piece.start, piece.length
            planned.header = piece.header
        return row + len(span.pieces)

    def _memory(self, row: int, tensor: PendingTensor) -> TensorMemory:
        """Of `tensor`, whose rows begin with `row`."""
        memory = tensor.in_c
        assert memory is not None
        self._tensors.append((row, tensor, memory))
        return memory


def _may_be_taken(piece: Piece[PendingTensor]) -> bool:
    """Whether C may take a piece of a header: all of it, of a tensor that it knows."""
    tensor = piece.target
    whole = piece.length == tensor.record.header_length
    return whole and tensor.in_c is not None and tensor.in_c.expects
