"""How does C put a job's bytes in their place: a table of spans, and of the tensors behind them?

span_table.c takes the bytes, from libcurl or from Python, and opens sealed chunks. Python plans the
table before the job, is called for spans with headers, and looks afterwards at the rows that
completed a tensor, or did not authenticate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from copy import copy
from enum import IntEnum
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tensorserve.crypto.backends import fastest_box
from tensorserve.format import TensorHeader
from tensorserve.linux import can_populate
from tensorserve.sources.scatter_read import Filling, Sink

_Call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_int)
# PyBUF_WRITE (object.h).
_PYBUF_WRITE = 0x200


class _Cipher(ctypes.Structure):
    _fields_ = (
        ("open", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("open_strip", ctypes.c_void_p),
        ("check", ctypes.c_void_p),
        ("populates", ctypes.c_int64),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("place", ctypes.c_void_p),
        ("length", ctypes.c_int64),
        ("cipher", ctypes.c_void_p),
        ("key", ctypes.c_char_p),
        ("nonce", ctypes.c_char_p),
        ("tags", ctypes.c_char_p),
        ("chunk_bytes", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("partials", ctypes.c_void_p),
        ("failed", ctypes.c_void_p),
        ("left", ctypes.c_int64),
        ("early", ctypes.c_void_p),
        ("early_count", ctypes.c_int32),
        ("early_room", ctypes.c_int32),
        ("waits", ctypes.c_int32),
        ("lock", ctypes.c_int32),
        ("expected", ctypes.c_char_p),
        ("expected_size", ctypes.c_int64),
        ("head", ctypes.c_void_p),
        ("head_size", ctypes.c_int64),
        ("file_key", ctypes.c_char_p),
        ("headed", ctypes.c_int32),
    )


class Row(ctypes.Structure):
    """row of span_table.c: bytes of one tensor within one span."""

    _fields_ = (
        ("t", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("finished", ctypes.c_int64),
        ("failures", ctypes.c_int32),
        ("complete", ctypes.c_int32),
        ("early", ctypes.c_int32),
        ("header", ctypes.c_int32),
    )


class Caller(IntEnum):
    """Who assembles a span. The values are those of span_table.c."""

    C = 0
    PYTHON = 1
    C_IF_EXPECTED = 2
    """C where all headers in it are as expected, else Python."""


class SpanState(ctypes.Structure):
    """span of span_table.c."""

    _fields_ = (
        ("length", ctypes.c_int64),
        ("direct", ctypes.c_void_p),
        ("first_row", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("call", ctypes.c_int32),
        ("claimed", ctypes.c_int32),
        ("mine", ctypes.c_int32),
    )


class _Table(ctypes.Structure):
    _fields_ = (
        ("spans", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("buffer", ctypes.c_void_p),
        ("buffer_size", ctypes.c_int64),
        ("call", _Call),
        ("owner", ctypes.c_void_p),
        ("cipher", ctypes.c_void_p),
        ("filled", ctypes.c_int64),
        ("done", ctypes.c_int64),
        ("began", ctypes.c_int64),
        ("opening", ctypes.c_int64),
        ("fetched", ctypes.c_int64),
        ("opened", ctypes.c_int64),
        ("event", ctypes.c_void_p),
        ("position", ctypes.c_uint32),  # the low half of `progress`
        ("wanted", ctypes.c_uint32),
        ("stopped", ctypes.c_int32),
        ("finished", ctypes.c_int32),
        ("events", ctypes.c_int32),
    )


class _Functions(NamedTuple):
    cipher: _Cipher
    take: Any
    take_address: int
    room: Any
    claim: Any
    give_up: Any
    run: Any
    tensor_take: Any
    tensor_put: Any
    tensor_ready: Any
    tensor_count: Any
    tensor_free: Any


@cache
def functions() -> _Functions | None:
    """span_table.c with the cipher of this processor; None if it was not built."""
    try:
        own = ctypes.CDLL(str(Path(__file__).with_name("_span_table.so")))
        # With the interpreter's lock: they end at once, and to let go of it costs more.
        short = ctypes.PyDLL(str(Path(__file__).with_name("_span_table.so")))
    except OSError:
        return None
    structures = (_Cipher, _Tensor, Row, SpanState, _Table)
    own.table_sizes.restype = ctypes.c_int64
    if any(own.table_sizes(i) != ctypes.sizeof(each) for i, each in enumerate(structures)):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    own.table_take.argtypes, own.table_take.restype = (pointer, pointer, number), number
    own.table_room.argtypes, own.table_room.restype = (pointer, pointer), pointer
    short.table_claim.argtypes = short.table_give_up.argtypes = (pointer, ctypes.c_int)
    short.table_run.argtypes = (
        *(pointer, ctypes.c_int, ctypes.c_int, pointer, number, number, number),
        ctypes.c_int,
    )
    short.table_run.restype = None
    own.tensor_take.argtypes = (pointer, number, pointer, number, pointer)
    own.tensor_take.restype = number
    own.tensor_put.argtypes, own.tensor_put.restype = (pointer, pointer), None
    own.tensor_ready.argtypes, own.tensor_ready.restype = (pointer, pointer, pointer), number
    short.tensor_count.argtypes = (pointer, number)
    short.tensor_free.argtypes, short.tensor_free.restype = (pointer,), None
    address = ctypes.cast(own.table_take, pointer).value
    assert address is not None
    return _Functions(
        _cipher(),
        own.table_take,
        address,
        own.table_room,
        short.table_claim,
        short.table_give_up,
        short.table_run,
        own.tensor_take,
        own.tensor_put,
        own.tensor_ready,
        short.tensor_count,
        short.tensor_free,
    )


def _cipher() -> _Cipher:
    box = fastest_box()
    found = [box.open, *((None,) * 3 if box.strips is None else box.strips)]
    return _Cipher(
        *(None if each is None else ctypes.cast(each, ctypes.c_void_p).value for each in found),
        int(can_populate()),
    )


@lru_cache(maxsize=1024)
def _array(kind: Any, count: int) -> Any:
    """The type of `count` in a row: ctypes makes a new class for each length, which takes longer
    than all else that is done for a job's table.
    """
    return kind * count


@cache
def _view() -> Any:
    """(address, bytes, flags) -> a memoryview, without a class for each length."""
    found = ctypes.pythonapi.PyMemoryView_FromMemory
    found.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    found.restype = ctypes.py_object
    return found


def _address(memory: memoryview | bytearray) -> tuple[int, Any]:
    """(the address of `memory`, what keeps it)."""
    kept = ctypes.c_ubyte.from_buffer(memory)
    return ctypes.addressof(kept), kept


class TensorMemory:
    """A tensor's memory, as span_table.c knows it. With `header`, chunks are opened into it."""

    def __init__(
        self,
        memory: memoryview,
        header: TensorHeader | None,
        key: bytes | None,
        *,
        waits: bool = False,
    ) -> None:
        """`waits`: the header comes later (`ready`). Until then bytes are put there as they are."""
        self._make(len(memory), waits=waits)
        self.put_into(memory)
        if header is not None:
            self._open_with(header, key)

    @classmethod
    def to_come(cls, length: int) -> TensorMemory:
        """That of a tensor whose memory (`put_into`) and header come later."""
        made = cls.__new__(cls)
        made._make(length, waits=True)
        return made

    def _make(self, length: int, *, waits: bool) -> None:
        found = functions()
        assert found is not None
        self._functions = found
        self._c = _Tensor(
            None, length, ctypes.addressof(found.cipher), left=length + 1, waits=waits
        )
        self.address = ctypes.addressof(self._c)
        """Of the structure in C."""
        self._memory: Any = None
        self._kept: list[Any] = []
        self._failed: bytearray | memoryview | None = None
        self._head: bytearray | None = None

    def put_into(self, memory: memoryview) -> None:
        """This is the tensor's memory."""
        self._c.place, self._memory = _address(memory)

    def _open_with(self, header: TensorHeader, key: bytes | None) -> None:
        chunks = header.chunks
        if chunks is None:
            return
        assert key is not None
        self._c.chunks = chunks.count
        self._c.chunk_bytes = self._c.length if chunks.count == 1 else chunks.chunk_size
        self._c.key, self._c.nonce, self._c.tags = key, chunks.nonce, chunks.tags
        self._c.partials = self._keep(bytearray(chunks.count * ctypes.sizeof(ctypes.c_void_p)))
        self._failed = bytearray(chunks.count)
        self._c.failed = self._keep(self._failed)

    def __del__(self) -> None:
        self._functions.tensor_free(ctypes.byref(self._c))

    def _keep(self, memory: bytearray) -> int:
        address, kept = _address(memory)
        self._kept.append(kept)
        return address

    def expect(self, fixed: bytes, length: int, key: bytes | None) -> None:
        """The header, of `length` bytes, may be taken by C, if it begins with the index's `fixed`
        fields (format's `fixed_fields`), and the rest is as usual. `key`: None for a plain file.
        """
        self._head = bytearray(length)
        self._c.expected, self._c.expected_size = fixed, len(fixed)
        self._c.head, self._c.head_size = self._keep(self._head), length
        self._c.file_key = key

    @property
    def expects(self) -> bool:
        """Whether `expect` was called."""
        return self._head is not None

    @property
    def head(self) -> bytes | None:
        """The header that C has taken; None where it took none."""
        return bytes(self._head) if self._head is not None and self._c.headed else None

    @property
    def is_sealed(self) -> bool:
        """Whether the header has come, and says so."""
        return bool(self._c.chunks)

    def let_go(self) -> None:
        """Nothing more is written there. A job that goes on may still look at the structure."""
        self._memory = None

    def ready(self, header: TensorHeader, key: bytes | None) -> tuple[int, int, int]:
        """The header has come: (bytes that became plain text, sealed ones among those that had
        come before it, chunks that did not authenticate). `count` has to be told of the first.
        """
        self._open_with(header, key)
        taken, failures = ctypes.c_int64(), ctypes.c_int32()
        finished = self._functions.tensor_ready(
            self.address, ctypes.byref(taken), ctypes.byref(failures)
        )
        return int(finished), taken.value if header.chunks is not None else 0, failures.value

    def put(self, start: int, data: memoryview) -> Row:
        """Put bytes in their place, from `start` on, and count them where none failed."""
        row = Row(self.address, start, len(data))
        address, _kept = _address(data)
        self._functions.tensor_put(ctypes.byref(row), address)
        return row

    def count(self, count: int) -> bool:
        """`count` more bytes are plain text, or the header was parsed (1); True when that was the
        last of the tensor.
        """
        return bool(self._functions.tensor_count(self.address, count))

    def take(self, start: int, data: memoryview | None, length: int) -> tuple[int, int]:
        """(bytes that became plain text, chunks among them that did not authenticate) because bytes
        [start, start + length) came: `data`, or None where they are in their place, sealed.
        """
        failures = ctypes.c_int32()
        address, _kept = (None, None) if data is None else _address(data)
        finished = self._functions.tensor_take(
            self.address, start, address, length, ctypes.byref(failures)
        )
        return int(finished), failures.value

    def failed(self, start: int, stop: int) -> list[int]:
        """The chunks of bytes [start, stop) that did not authenticate; each is told once."""
        if self._failed is None:
            if not self._c.failed:
                return []
            self._failed = _view()(self._c.failed, self._c.chunks, _PYBUF_WRITE)
        size = self._c.chunk_bytes
        stop = min(stop, self._c.length)
        found = [i for i in range(start // size, -(-stop // size)) if self._failed[i]]
        for index in found:
            self._failed[index] = 0
        return found


class SpanTable(Filling):
    """A `Filling` that C fills. `rows` are planned by the caller, up to the next span whose `call`
    is not `Caller.C`: where it is Python's, C calls `called` with its number, which may plan those
    behind it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        rows: int,
        buffer: memoryview,
        called: Callable[[int], None],
    ) -> None:
        """`rows`: how many there may be. `buffer`: as long as the longest span that is not received
        in its place.
        """
        self._make(len(lengths), sum(lengths), rows, buffer, called)
        for state, length in zip(self.spans, lengths, strict=True):
            state.length = length

    @classmethod
    def of_bytes(
        cls, spans: int, length: int, rows: int, buffer: memoryview, called: Callable[[int], None]
    ) -> SpanTable:
        """One whose `spans`, `length` bytes in all, are still to be described."""
        made = cls.__new__(cls)
        made._make(spans, length, rows, buffer, called)
        return made

    def _make(
        self, spans: int, length: int, rows: int, buffer: memoryview, called: Callable[[int], None]
    ) -> None:
        found = functions()
        assert found is not None
        self._functions = found
        self.spans = _array(SpanState, spans)()
        self.rows = _array(Row, max(1, rows))()
        self._event: ctypes.Array[ctypes.c_int32] = _array(ctypes.c_int32, max(1, rows))()
        address, self._buffer = _address(buffer)
        self._called = called
        self._c = _Table(
            ctypes.addressof(self.spans),
            ctypes.addressof(self.rows),
            address,
            len(buffer),
            _call,
            id(self),
            ctypes.addressof(found.cipher),
            event=ctypes.addressof(self._event),
            wanted=spans,
        )
        self._state = ctypes.addressof(self._c)
        self._errors: list[BaseException] = []
        self._origin: SpanTable | None = None
        """What C knows as the table's, where this is the rest of it."""
        self._base = 0
        self._length = length

    def called(self, number: int) -> int:
        """By C: non-zero where it shall end."""
        try:
            self._called(number)
        # Raised when C has returned: an exception must not pass through it.
        except BaseException as error:  # noqa: BLE001
            self._errors.append(error)
            return 1
        return 0

    # As `Filling` ---------------------------------------------------------------------------------

    def rest(self) -> Filling:
        """See `Filling`."""
        other = copy(self)
        other._origin = self
        other._base = self._c.done
        other._length = self._length - self.done
        return other

    @property
    def done(self) -> int:
        """See `Filling`."""
        return int(self._c.done) - self._base

    @property
    def begun(self) -> bool:
        """See `Filling`."""
        return bool(self._c.filled)

    @property
    def finished(self) -> bool:
        """See `Filling`."""
        return bool(self._c.finished)

    @property
    def sink(self) -> Sink:
        """See `Filling`."""
        finished = self._state + _Table.finished.offset
        return Sink(self._functions.take_address, self._state, finished)

    def check(self) -> None:
        """See `Filling`."""
        if self._errors:
            raise self._errors[0]

    @property
    def wanted(self) -> memoryview:
        """See `Filling`."""
        room = ctypes.c_int64()
        address = self._functions.room(self._state, ctypes.byref(room))
        view: memoryview = _view()(address, room.value, _PYBUF_WRITE)
        return view

    def ends_with(self, count: int) -> bool:
        """See `Filling`."""
        return self.done + count == self.length

    def add(self, count: int) -> None:
        """See `Filling`."""
        self._functions.take(self._state, None, count)
        self.check()

    # What other threads look at -------------------------------------------------------------------

    @property
    def position(self) -> int:
        """How many spans are done."""
        return int(self._c.position)

    @property
    def began(self) -> float:
        """When the span at `position` was begun; monotonic seconds, 0 where none was."""
        return float(self._c.began) / 1e9

    @property
    def opening_seconds(self) -> float:
        """Time spent on putting bytes in their place."""
        return float(self._c.opening) / 1e9

    @property
    def taken(self) -> tuple[int, int]:
        """(bytes of rows that have come, those among them that were sealed and opened here)."""
        return int(self._c.fetched), int(self._c.opened)

    def events(self, first: int) -> list[int]:
        """Rows to look at, without the `first` ones: they completed a tensor, or failed."""
        return self._event[first : self._c.events]

    def run(
        self,
        number: int,
        row: int,
        memory: TensorMemory,
        place: tuple[int, int],
        size: int,
        *,
        direct: bool,
    ) -> None:
        """Spans from `number` and rows from `row` on: bytes (start, stop) of a tensor, cut at
        multiples of `size`. `direct`: they are received in their place.
        """
        self._functions.run(self._state, number, row, memory.address, *place, size, direct)

    def claim(self, number: int) -> bool:
        """Whether the caller's copy of a span is the one that is used."""
        return bool(self._functions.claim(self._state, number))

    def give_up(self, stop: int) -> bool:
        """Leave the spans from `stop` on to another table; False where one of them is begun."""
        return bool(self._functions.give_up(self._state, stop))

    def stop(self) -> None:
        """End at the next span."""
        self._c.stopped = 1


def _ask(table: SpanTable, number: int) -> int:
    return table.called(number)


# One function for all tables: to make one takes longer than to fill a table.
_call = _Call(_ask)
