"""C puts a job's bytes in their place: chunks come in pieces, in any order, by several threads."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from sodium_strips import SodiumStrips
from tensorserve.crypto.backends import TAG_SIZE, sodium_box
from tensorserve.crypto.secretbox import TagMismatchError, nonce_at
from tensorserve.loading import span_table
from tensorserve.loading.span_table import SpanTable, TensorMemory, functions

KEY, NONCE = bytes(range(32)), bytes(range(23)) + b"\xff"
CHUNK = 64 * 1024
SIZES = (1, 63, 64, CHUNK, CHUNK + 1, 3 * CHUNK + 1001)


@dataclass(frozen=True)
class Chunks:
    """As format.ChunkedCipher."""

    chunk_size: int
    nonce: bytes
    tags: bytes

    @property
    def count(self) -> int:
        return len(self.tags) // TAG_SIZE


@dataclass(frozen=True)
class Header:
    """As format.TensorHeader, as far as it is read here."""

    chunks: Chunks


def sealed(plain: bytes) -> tuple[bytes, Any]:
    """(the sealed bytes, their header)."""
    box, out, tags = sodium_box(), b"", b""
    for index in range(-(-len(plain) // CHUNK)):
        piece = plain[index * CHUNK : (index + 1) * CHUNK]
        text, tag = ctypes.create_string_buffer(len(piece)), ctypes.create_string_buffer(16)
        box.seal(text, tag, piece, len(piece), nonce_at(NONCE, index), KEY)
        out, tags = out + text.raw, tags + tag.raw
    return out, Header(Chunks(CHUNK, NONCE, tags))


class Strips:
    """The functions of secretbox.c for strips, made of libsodium's, for any processor."""

    def __init__(self) -> None:
        self._made: dict[int, SodiumStrips] = {}
        self.opened = 0
        pointer, number = ctypes.c_void_p, ctypes.c_uint64
        self.begin = ctypes.CFUNCTYPE(None, pointer, pointer, pointer)(self._begin)
        types = (pointer, pointer, pointer, pointer, number, number)
        self.open = ctypes.CFUNCTYPE(None, *types)(self._open)
        types = (pointer, pointer, pointer, number, pointer)
        self.check = ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._check)

    def _begin(self, state: int, nonce: int, key: int) -> None:
        # Several states may have had one address, one after the other.
        self._made[state] = SodiumStrips(ctypes.string_at(key, 32), ctypes.string_at(nonce, 24))

    def _open(self, state: int, _: int, out: int, data: int, offset: int, length: int) -> None:
        self.opened += 1
        text = bytearray(length)
        self._made[state].open(offset, memoryview(ctypes.string_at(data, length)), memoryview(text))
        ctypes.memmove(out, bytes(text), length)

    def _check(self, state: int, _: int, _lengths: int, _count: int, tag: int) -> int:
        try:
            self._made[state].check(ctypes.string_at(tag, 16))
        except TagMismatchError:
            return -1
        return 0


@pytest.fixture(params=["whole chunks", "strips"])
def strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Strips]:
    """Both ways of a cipher."""
    found = functions()
    assert found is not None, "span_table.c was not built"
    made = Strips()
    cipher = span_table._Cipher(
        ctypes.cast(sodium_box().open, ctypes.c_void_p).value, populates=found.cipher.populates
    )
    if request.param == "strips":
        cipher.begin, cipher.open_strip, cipher.check = (
            ctypes.cast(each, ctypes.c_void_p).value for each in (made.begin, made.open, made.check)
        )
    monkeypatch.setattr(span_table, "functions", lambda: found._replace(cipher=cipher))
    yield made
    assert bool(made.opened) == (request.param == "strips") or not made.opened


def pieces(length: int, seed: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) that cover `length` bytes, shuffled."""
    made, at, chance = [], 0, random.Random(seed)
    while at < length:
        stop = min(length, at + chance.randint(1, most))
        made.append((at, stop))
        at = stop
    chance.shuffle(made)
    return made


@pytest.mark.parametrize("most", [1000, 5 * CHUNK])
@pytest.mark.parametrize("size", SIZES)
def test_pieces_in_any_order_become_the_plain_text(strips: Strips, size: int, most: int) -> None:
    """Also more of them than are kept apart, and with bytes that came before the header."""
    plain = random.Random(size).randbytes(size)
    data, header = sealed(plain)
    for seed in range(3):
        place = bytearray(size)
        memory = TensorMemory(memoryview(place), header, KEY)
        finished = 0
        for number, (start, stop) in enumerate(pieces(size, seed, most)):
            given: memoryview | None = memoryview(bytearray(data[start:stop]))
            if number % 3 == 2:
                place[start:stop] = data[start:stop]
                given = None
            count, failures = memory.take(start, given, stop - start)
            assert not failures
            finished += count
        assert finished == size
        assert place == plain
    assert strips is not None


def test_a_damaged_chunk_is_told_once_and_the_others_are_whole(strips: Strips) -> None:
    """It counts as finished, so that the load goes on when it was read again."""
    plain = random.Random(1).randbytes(3 * CHUNK)
    data, header = sealed(plain)
    spoiled = bytearray(data)
    spoiled[CHUNK + 7] ^= 1
    place = bytearray(len(plain))
    memory = TensorMemory(memoryview(place), header, KEY)
    finished = failures = 0
    for start, stop in pieces(len(plain), 5, 10_000):
        count, bad = memory.take(start, memoryview(spoiled[start:stop]), stop - start)
        finished, failures = finished + count, failures + bad
    assert (finished, failures) == (len(plain), 1)
    assert memory.failed(0, len(plain)) == [1]
    assert memory.failed(0, len(plain)) == []
    assert place[:CHUNK] + place[2 * CHUNK :] == plain[:CHUNK] + plain[2 * CHUNK :]
    assert strips is not None


def test_threads_share_a_chunk(strips: Strips) -> None:
    """Each brings every fourth piece."""
    plain = random.Random(2).randbytes(4 * CHUNK + 5)
    data, header = sealed(plain)
    place = bytearray(len(plain))
    memory = TensorMemory(memoryview(place), header, KEY)
    every, found = pieces(len(plain), 3, 5000), [0] * 4

    def work(number: int) -> None:
        for start, stop in every[number::4]:
            found[number] += memory.take(
                start, memoryview(bytearray(data[start:stop])), stop - start
            )[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found) == len(plain)
    assert place == plain
    assert strips is not None


@pytest.mark.parametrize("size", SIZES)
def test_what_comes_before_the_header_is_opened_with_it(strips: Strips, size: int) -> None:
    """Whatever part of it; a damaged chunk is told, and all bytes count once."""
    plain = random.Random(size).randbytes(size)
    data, header = sealed(plain)
    for seed, damage in ((1, False), (2, False), (3, True)):
        place, spoiled = bytearray(size), bytearray(data)
        spoiled[size // 2] ^= damage
        memory = TensorMemory(memoryview(place), None, None, waits=True)
        every = pieces(size, seed, max(1, size // 5))
        half = len(every) // 2
        failed = counted = 0
        for number, (start, stop) in enumerate(every):
            if number == half:
                finished, opened, failures = memory.ready(header, KEY)
                assert opened == sum(b - a for a, b in every[:half])
                assert not memory.count(finished)
                failed, counted = failures, finished
            row = memory.put(start, memoryview(bytearray(spoiled[start:stop])))
            assert bool(row.early) == (number < half)
            assert not row.complete  # the header's own one is not counted yet
            failed, counted = failed + row.failures, counted + row.finished
            if row.failures:
                assert not memory.count(row.finished)
        assert (counted, failed) == (size, int(damage))
        assert memory.count(1)
        assert damage or place == plain
    assert strips is not None


def test_plain_bytes_count_with_the_header(strips: Strips) -> None:
    """The last of them, or the header, completes the tensor; once."""
    place = bytearray(10)
    memory = TensorMemory(memoryview(place), None, None, waits=True)
    assert memory.put(0, memoryview(bytearray(b"01234"))).finished == 0
    plain: Any = Header(None)  # type: ignore[arg-type]
    assert memory.ready(plain, None) == (5, 0, 0)
    assert not memory.count(5 + 1)
    row = memory.put(5, memoryview(bytearray(b"56789")))
    assert (row.finished, row.complete) == (5, 1)
    assert place == b"0123456789"
    assert strips is not None


# Tables -------------------------------------------------------------------------------------------


def table(lengths: list[int], called: Any = lambda _: None) -> tuple[SpanTable, bytearray]:
    """A table of plain spans, and the memory behind them."""
    place = bytearray(sum(lengths))
    memory = TensorMemory(memoryview(place), None, None)
    made = SpanTable(lengths, len(lengths), memoryview(bytearray(max(lengths))), called)
    at = 0
    for number, length in enumerate(lengths):
        row = made.rows[number]
        row.t, row.start, row.length = memory.address, at, length
        made.spans[number].first_row, made.spans[number].rows = number, 1
        at += length
    made._kept_for_test = memory  # type: ignore[attr-defined]
    return made, place


def fed(made: SpanTable, data: bytes, step: int) -> None:
    """As a source that Python reads does it."""
    at = 0
    while not made.finished and at < len(data):
        wanted = made.wanted
        count = min(len(wanted), step, len(data) - at)
        wanted[:count] = data[at : at + count]
        made.add(count)
        at += count


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_spans_are_filled_one_after_the_other(step: int) -> None:
    """However the bytes come."""
    lengths = [10, 1, 300, 17]
    made, place = table(lengths)
    data = random.Random(3).randbytes(sum(lengths))
    fed(made, data, step)
    assert made.finished
    assert (made.done, made.position) == (len(data), 4)
    assert place == data
    assert [row.finished for row in made.rows] == lengths


@pytest.mark.parametrize("direct", [False, True])
def test_a_run_is_cut_and_its_last_row_is_told(direct: bool) -> None:
    """One call for all of its spans; the tensor's last byte is an event, and nothing else is."""
    data = random.Random(4).randbytes(95)
    place = bytearray(100)
    memory = TensorMemory(memoryview(place), None, None)
    memory.count(6)  # what comes elsewhere: the first five bytes, and the header
    made = SpanTable.of_bytes(10, 95, 10, memoryview(bytearray(10)), lambda _: None)
    made.run(0, 0, memory, (5, 100), 10, direct=direct)
    assert [state.length for state in made.spans] == [5, *[10] * 9]
    fed(made, data[:90], 7)
    assert made.events(0) == []
    fed(made, data[90:], 7)
    assert (made.finished, made.events(0), made.events(1)) == (True, [9], [])
    assert (made.rows[9].complete, made.taken) == (1, (95, 0))
    assert place[5:] == data


def test_a_table_gives_up_spans_that_are_not_begun() -> None:
    """And ends where the other one begins; what is begun it keeps."""
    made, place = table([10, 10, 10, 10])
    fed(made, b"a" * 15, 5)
    assert not made.give_up(1)
    assert made.give_up(2)
    assert not made.give_up(3)
    fed(made, b"b" * 25, 5)
    assert made.finished
    assert place == b"a" * 15 + b"b" * 5 + bytes(20)


def test_the_first_copy_of_a_span_is_used() -> None:
    """What another thread has claimed is not written here."""
    made, place = table([4, 4])
    assert made.claim(0)
    assert not made.claim(0)
    fed(made, b"xxxxyyyy", 3)
    assert place == bytes(4) + b"yyyy"
    assert [state.mine for state in made.spans] == [0, 1]


def test_what_python_raises_in_the_middle_is_raised_afterwards() -> None:
    """And ends the table."""

    def called(number: int) -> None:
        raise ValueError(f"span {number}")

    made, _ = table([4, 4, 4], called)
    made.spans[1].call = 1
    with pytest.raises(ValueError, match="span 1"):
        fed(made, bytes(12), 4)
    assert made.finished
    with pytest.raises(ValueError, match="span 1"):
        made.check()


def test_a_stopped_table_ends_with_its_span() -> None:
    """A load that ends waits for no job."""
    made, place = table([4, 4])
    made.stop()
    fed(made, b"xxxxyyyy", 3)
    assert made.finished
    assert place == b"xxxx" + bytes(4)
