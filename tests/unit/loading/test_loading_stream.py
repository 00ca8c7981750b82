"""The pipeline: whatever the sizes, threads and budget, the tensors are those of the file."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorizer import EncryptionParams, TensorSerializer

from tensors_samples import FixedKey
from tensorserve.bundle.keys import GivenKey
from tensorserve.errors import CorruptError, SourceUnavailableError
from tensorserve.format import (
    FileKey,
    TensorHeader,
    TensorRecord,
    parse_header,
    read_header,
    read_index,
)
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream, tensor_headers
from tensorserve.loading.span_table import functions
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Filling, Source
from waiting import wait_for

MIB = 1024**2


class MemorySource(Source):
    """A source over bytes; `spoil` and `fail_at` make trouble."""

    remote = True
    pinned = True

    def __init__(self, data: bytes) -> None:
        self.name, self.size, self.version = "memory", len(data), None
        self.data = data
        self.reads: list[tuple[int, int]] = []
        self.spoil: dict[int, int] = {}  # offset → how many more reads of it are damaged
        self.mask = 1  # how
        self.fail_at: int | None = None
        self.needed_from = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        if self.fail_at is not None and offset <= self.fail_at < offset + len(buffer):
            raise SourceUnavailableError("memory is gone")
        buffer[:] = self.data[offset : offset + len(buffer)]
        for place in self.spoil:
            if offset <= place < offset + len(buffer) and self.spoil[place] > 0:
                self.spoil[place] -= 1
                buffer[place - offset] ^= self.mask

    def read_parts(self, offset: int, parts: Filling) -> None:
        assert offset >= self.needed_from, "read although it was said to be needed no more"
        while not parts.finished:
            wanted = parts.wanted
            self.read_into(offset + parts.done, wanted)
            parts.add(len(wanted))

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def passed(self, offset: int) -> None:
        self.needed_from = max(self.needed_from, offset)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Sizes around every boundary: chunk, batch, range, and none at all."""
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "one": 1, "odd": 1001, "chunk": 2 * MIB, "chunk_and_one": 2 * MIB + 1,
        "small": DEFAULTS.small_bytes, "small_and_one": DEFAULTS.small_bytes + 1,
        "range": DEFAULTS.job_bytes,
        "ranges": 2 * DEFAULTS.job_bytes + 3 * MIB + 17, "last": 3,
    }  # fmt: skip
    made = {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for name, size in sizes.items()
    }
    made["shaped"] = torch.randn(3, 5, 7, generator=generator).to(torch.bfloat16)
    made["scalar"] = torch.tensor(2.5)
    return made


def written(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], key: bytes | None
) -> bytes:
    path: Path = tmp_path_factory.mktemp("tensors") / "model.tensors"
    encryption = EncryptionParams(key=key) if key else None
    serializer = TensorSerializer(str(path), encryption=encryption)
    serializer.write_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    serializer.close()
    return path.read_bytes()


KEY = bytes(range(32))


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> bytes:
    return written(tmp_path_factory, tensors, KEY)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> bytes:
    return written(tmp_path_factory, tensors, None)


def no_thread_is_left() -> None:
    """Of the loads: an ended one waits for its threads half a second only."""
    wait_for(
        lambda: not [t for t in threading.enumerate() if t.name.startswith("tensorserve-load")]
    )


def streamed(
    source: MemorySource, options: LoadOptions, key: FileKey | None
) -> tuple[dict[str, torch.Tensor], LoadProgress]:
    index = read_index(source)
    progress = LoadProgress()
    with TensorStream(
        source,
        index.tensors,
        encrypted=index.encrypted,
        key=key,
        options=options,
        progress=progress,
    ) as stream:
        return {record.name: tensor.clone() for record, tensor in stream}, progress


@pytest.mark.parametrize("connections", [1, 2, 16])
@pytest.mark.parametrize("ahead", [1, 5 * MIB, 1024 * MIB])
def test_encrypted_tensors_are_bit_identical(
    encrypted: bytes, tensors: dict[str, torch.Tensor], connections: int, ahead: int
) -> None:
    """Also where the budget is smaller than any tensor."""
    options = LoadOptions(connections=connections, ahead_bytes=ahead)
    found, progress = streamed(MemorySource(encrypted), options, GivenKey(KEY, "test"))
    assert list(found) == [r.name for r in read_index(MemorySource(encrypted)).tensors]
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    total = sum(t.nbytes for t in tensors.values())
    snapshot = progress.snapshot()
    assert (snapshot.fetch, snapshot.decrypt) == (total, total)


@pytest.mark.skipif(functions() is None, reason="span_table.c was not built")
@pytest.mark.parametrize("known", [True, False], ids=["key", "key of each header"])
def test_headers_that_say_what_the_index_says_are_taken_by_c(
    encrypted: bytes,
    tensors: dict[str, torch.Tensor],
    known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python parses none, and knows them all; where each may have its own key, it parses all."""
    parsed = []

    def counted(record: TensorRecord, *data: Any, **named: Any) -> TensorHeader:
        parsed.append(record.name)
        return parse_header(record, *data, **named)

    monkeypatch.setattr(tensor_headers, "parse_header", counted)
    index = read_index(MemorySource(encrypted))
    headers = b"".join(encrypted[r.header_offset : r.data_offset] for r in index.tensors)
    options = LoadOptions(connections=1, headers_sha256=hashlib.sha256(headers).hexdigest())
    key: FileKey = GivenKey(KEY, "test") if known else FixedKey(KEY)
    found, _ = streamed(MemorySource(encrypted), options, key)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert sorted(parsed) == ([] if known else sorted(tensors))


def test_plain_tensors_are_bit_identical_and_undecrypted(
    plain: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """The same path serves files that are not encrypted."""
    options = LoadOptions(connections=4, verify_hashes=True)
    found, progress = streamed(MemorySource(plain), options, None)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert progress.snapshot().decrypt == 0


def test_a_chunk_damaged_on_the_wire_is_read_once_more(
    encrypted: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """F8: one flipped bit in flight costs one small read, not the start."""
    source = MemorySource(encrypted)
    record = next(r for r in read_index(source).tensors if r.name == "ranges")
    source.spoil = {record.data_offset + DEFAULTS.job_bytes + 5: 1}
    found, progress = streamed(source, LoadOptions(connections=3), GivenKey(KEY, "test"))
    assert torch.equal(found["ranges"], tensors["ranges"])
    assert progress.snapshot().retries == {"corrupt": 1}


def test_a_chunk_damaged_at_rest_ends_the_load(encrypted: bytes) -> None:
    """F8: the damage stays after the second read; the error names the tensor."""
    source = MemorySource(encrypted)
    record = next(r for r in read_index(source).tensors if r.name == "chunk_and_one")
    source.spoil = {record.data_offset + 7: 1000}
    with pytest.raises(CorruptError, match="chunk_and_one"):
        streamed(source, LoadOptions(connections=3), GivenKey(KEY, "test"))


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, torch.Tensor]]:
    """(a file with a tensor of several chunks, in spite of its size; its tensors)."""
    path = tmp_path_factory.mktemp("chunked") / "model.tensors"
    serializer = TensorSerializer(str(path), encryption=EncryptionParams(key=KEY))
    serializer._crypt_chunk_size = 4096
    tensors = {
        "before": torch.arange(11, dtype=torch.int16),
        "chunked": torch.arange(10_001, dtype=torch.int16),
        "after": torch.arange(5, dtype=torch.int16),
    }
    serializer.write_state_dict(tensors)
    serializer.close()
    return path.read_bytes(), tensors


# Each bit with one connection; with three, every third one, which is of every byte.
@pytest.mark.parametrize(("connections", "step", "least"), [(1, 1, 100), (3, 3, 33)])
def test_a_header_bit_damaged_on_the_wire_costs_one_read(
    chunked: tuple[bytes, dict[str, torch.Tensor]], connections: int, step: int, least: int
) -> None:
    """F8: also one that changes where its chunks are cut: they were opened in the wrong places."""
    data, tensors = chunked
    record = next(r for r in read_index(MemorySource(data)).tensors if r.name == "chunked")
    parsed = 0
    for bit in range(0, 8 * record.header_length, step):
        source = MemorySource(data)
        source.spoil, source.mask = {record.header_offset + bit // 8: 1}, 1 << bit % 8
        found, progress = streamed(
            source, LoadOptions(connections=connections), GivenKey(KEY, "test")
        )
        assert all(torch.equal(found[name], tensors[name]) for name in tensors), bit
        assert progress.snapshot().retries.keys() <= {"corrupt"}
        parsed += parses(data, record, bit)
    assert parsed > least  # it went on with these headers: nonces, tags, hashes, sizes of chunks


def parses(data: bytes, record: TensorRecord, bit: int) -> bool:
    """Whether the record's header with that bit flipped still looks like one."""
    header = bytearray(data[record.header_offset : record.data_offset])
    header[bit // 8] ^= 1 << bit % 8
    try:
        parse_header(record, memoryview(header), encrypted=True, source_name="memory")
    except CorruptError:
        return False
    return True


def test_header_bits_damaged_at_rest_end_it_or_are_harmless(
    chunked: tuple[bytes, dict[str, torch.Tensor]],
) -> None:
    """F8: the hashes, which are not asked for here, are all that may be wrong unseen."""
    data, tensors = chunked
    record = next(r for r in read_index(MemorySource(data)).tensors if r.name == "chunked")
    refused = 0
    for bit in range(0, 8 * record.header_length, 5):
        source = MemorySource(data)
        source.spoil, source.mask = {record.header_offset + bit // 8: 1000}, 1 << bit % 8
        try:
            found, _ = streamed(source, LoadOptions(connections=2), GivenKey(KEY, "test"))
        except CorruptError:
            refused += 1
        else:
            assert all(torch.equal(found[name], tensors[name]) for name in tensors), bit
    assert refused > 100


def test_a_plain_tensor_damaged_on_the_wire_is_read_once_more(
    plain: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """F8: with TENSORSERVE_VERIFY=hashes, in its data or in its header."""
    record = next(r for r in read_index(MemorySource(plain)).tensors if r.name == "odd")
    for place in (record.data_offset, record.data_offset - 1, record.header_offset + 30):
        source = MemorySource(plain)
        source.spoil = {place: 1}
        options = LoadOptions(connections=2, verify_hashes=True)
        found, progress = streamed(source, options, None)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert progress.snapshot().retries.keys() <= {"corrupt"}


def test_a_plain_tensor_with_a_wrong_hash_ends_the_load(plain: bytes) -> None:
    """TENSORSERVE_VERIFY=hashes covers what has no tag."""
    source = MemorySource(plain)
    record = next(r for r in read_index(source).tensors if r.name == "odd")
    source.spoil = {record.data_offset: 1000}
    with pytest.raises(CorruptError, match="odd"):
        streamed(source, LoadOptions(connections=2, verify_hashes=True), None)


def test_any_threads_error_reaches_the_consumer_and_ends_all(
    encrypted: bytes,
) -> None:
    """The load ends with the source's own error, and nothing keeps running."""
    source = MemorySource(encrypted)
    index = read_index(source)
    source.fail_at = index.tensors[-1].data_offset
    with pytest.raises(SourceUnavailableError, match="memory is gone"):
        streamed(source, LoadOptions(connections=4), GivenKey(KEY, "test"))
    no_thread_is_left()


def test_a_consumer_that_stops_early_leaves_no_thread(encrypted: bytes) -> None:
    """vLLM may raise in the middle of a load."""
    source = MemorySource(encrypted)
    index = read_index(source)
    options = LoadOptions(connections=4, ahead_bytes=3 * MIB)
    with TensorStream(
        source,
        index.tensors,
        encrypted=True,
        key=GivenKey(KEY, "test"),
        options=options,
        progress=LoadProgress(),
    ) as stream:
        next(iter(stream))
    no_thread_is_left()


def test_memory_beyond_the_connections_is_for_tensors_in_flight(tmp_path: Path) -> None:
    """Nothing is consumed, and one thread goes on until only their share and an eighth is left."""
    limit = 256
    path = tmp_path / "model.tensors"
    serializer = TensorSerializer(str(path))
    tensors = {f"{n:03}": torch.full((MIB,), n, dtype=torch.uint8) for n in range(limit)}
    serializer.write_state_dict(tensors)
    serializer.close()
    source = MemorySource(path.read_bytes())
    data = {record.data_offset for record in read_index(source).tensors}
    with TensorStream(
        source,
        read_index(source).tensors,
        encrypted=False,
        key=None,
        options=LoadOptions(connections=1, ahead_bytes=limit * MIB),
        progress=LoadProgress(),
    ) as stream:
        (worker,) = (t for t in threading.enumerate() if t.name == "tensorserve-load-0")
        expected = limit - limit // 8 - 64
        wait_for(lambda: sum(at in data for at, _ in source.reads) >= expected)
        worker.join(0.2)  # it would go on
        assert sum(at in data for at, _ in source.reads) == expected
        for record, tensor in stream:
            assert torch.equal(tensor, tensors[record.name])


def test_what_waits_for_other_ranks_is_not_read_far_ahead(tmp_path: Path) -> None:
    """Whatever the memory, half a job for each connection is complete; the job may be the next."""
    path = tmp_path / "model.tensors"
    serializer = TensorSerializer(str(path))
    tensors = {f"{n:03}": torch.full((MIB,), n, dtype=torch.uint8) for n in range(64)}
    serializer.write_state_dict(tensors)
    serializer.close()
    source = MemorySource(path.read_bytes())
    data = {record.data_offset for record in read_index(source).tensors}
    with TensorStream(
        source,
        read_index(source).tensors,
        encrypted=False,
        key=None,
        options=LoadOptions(connections=1, ahead_bytes=1024 * MIB),
        progress=LoadProgress(),
        paced=True,
    ) as stream:
        (worker,) = (t for t in threading.enumerate() if t.name == "tensorserve-load-0")
        least, job = DEFAULTS.short_job_bytes // MIB, DEFAULTS.job_bytes // MIB
        wait_for(lambda: sum(at in data for at, _ in source.reads) >= least)
        worker.join(0.2)  # it would go on
        assert sum(at in data for at, _ in source.reads) <= least + job
        for record, tensor in stream:
            assert torch.equal(tensor, tensors[record.name])


def test_more_tensors_than_are_set_up_at_once(tmp_path: Path) -> None:
    """Their memory and their headers are their own, with and without data."""
    path = tmp_path / "model.tensors"
    serializer = TensorSerializer(str(path))
    count = 2 * DEFAULTS.prepared_tensors + 1
    wanted = {f"{n:03}": torch.full((n % 3, 5), n, dtype=torch.int32) for n in range(count)}
    serializer.write_state_dict(wanted)
    serializer.close()
    found, _ = streamed(MemorySource(path.read_bytes()), LoadOptions(connections=2), None)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_tensor_without_elements_comes_as_it_is(tmp_path: Path) -> None:
    """Nothing is read for it, and its shape is kept."""
    path = tmp_path / "model.tensors"
    serializer = TensorSerializer(str(path))
    serializer.write_state_dict({"empty": torch.empty(0, 4), "full": torch.ones(2)})
    serializer.close()
    found, _ = streamed(MemorySource(path.read_bytes()), LoadOptions(connections=2), None)
    assert found["empty"].shape == (0, 4)
    assert torch.equal(found["full"], torch.ones(2))


def test_tensors_are_filled_where_they_belong(
    encrypted: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """`place` names a tensor's final memory: no copy is made of it."""
    homes = {
        name: torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8)
        for name, tensor in tensors.items()
    }
    source = MemorySource(encrypted)
    with TensorStream(
        source,
        read_index(source).tensors,
        encrypted=True,
        key=GivenKey(KEY, "test"),
        options=LoadOptions(connections=3),
        progress=LoadProgress(),
        place=lambda record: homes[record.name],
    ) as stream:
        for record, tensor in stream:
            assert tensor.data_ptr() == homes[record.name].data_ptr()
            assert torch.equal(tensor, tensors[record.name])


def test_headers_that_are_not_the_manifests_are_refused(encrypted: bytes) -> None:
    """A tensor may be exchanged for another of the same shape, sealed with the same key."""
    source = MemorySource(encrypted)
    headers = b"".join(
        encrypted[r.header_offset : r.data_offset] for r in read_index(source).tensors
    )
    right = LoadOptions(connections=3, headers_sha256=hashlib.sha256(headers).hexdigest())
    streamed(source, right, GivenKey(KEY, "test"))
    wrong = LoadOptions(connections=3, headers_sha256=hashlib.sha256(b"x").hexdigest())
    with pytest.raises(CorruptError, match="not those of the manifest"):
        streamed(MemorySource(encrypted), wrong, GivenKey(KEY, "test"))


def test_headers_of_tensors_that_are_not_loaded_count_too(encrypted: bytes) -> None:
    """Else one tensor that the model computes itself would switch the check off."""
    records = read_index(MemorySource(encrypted)).tensors
    headers = b"".join(encrypted[r.header_offset : r.data_offset] for r in records)
    for digest, fits in ((hashlib.sha256(headers), True), (hashlib.sha256(b"x"), False)):
        options = LoadOptions(headers_sha256=digest.hexdigest(), left_out=(records[1],))
        with TensorStream(
            MemorySource(encrypted),
            [record for record in records if record is not records[1]],
            encrypted=True,
            key=GivenKey(KEY, "test"),
            options=options,
            progress=LoadProgress(),
        ) as stream:
            if fits:
                assert len(list(stream)) == len(records) - 1
                continue
            with pytest.raises(CorruptError, match="not those of the manifest"):
                list(stream)


def test_of_what_is_not_loaded_the_headers_alone_are_read(encrypted: bytes) -> None:
    """By the connections, one request for each: their data are not fetched, nor read at the end."""
    source = MemorySource(encrypted)
    records = read_index(source).tensors
    wanted = [record for record in records if record.length <= MIB]
    large = tuple(record for record in records if record.length > MIB)
    headers = b"".join(encrypted[r.header_offset : r.data_offset] for r in records)
    source.reads.clear()
    digest = hashlib.sha256(headers).hexdigest()
    found = {}
    with TensorStream(
        source,
        wanted,
        encrypted=True,
        key=GivenKey(KEY, "test"),
        options=LoadOptions(headers_sha256=digest, left_out=large, connections=3),
        progress=LoadProgress(),
    ) as stream:
        for record, tensor in stream:
            found[record.name] = tensor.clone()
    assert found.keys() == {record.name for record in wanted}
    assert sum(length for _, length in source.reads) < sum(r.length for r in wanted) + MIB
    assert len(source.reads) <= len(wanted) + len(large) + 3


@pytest.mark.parametrize("chunk", [3 * MIB, 16 * MIB, 64 * 1024])
def test_chunks_that_are_not_cut_as_our_parts_are(tmp_path: Path, chunk: int) -> None:
    """Of 3 MiB, or one around all: opened when all is there. Smaller ones: many in a part."""
    data = torch.randint(0, 256, (9 * MIB,), dtype=torch.uint8)
    path = tmp_path / "model.tensors"
    serializer = TensorSerializer(str(path), encryption=EncryptionParams(key=KEY))
    serializer._crypt_chunk_size = chunk  # the format can say any; tensorizer writes 2 MiB
    serializer.write_state_dict({"weight": data})
    serializer.close()
    source = MemorySource(path.read_bytes())
    header = read_header(source, read_index(source).tensors[0], read_index(source))
    assert header.chunks is not None
    assert header.chunks.count == -(-len(data) // chunk)
    found, _ = streamed(source, LoadOptions(connections=3), GivenKey(KEY, "test"))
    assert torch.equal(found["weight"], data)


def test_requests_begin_and_end_where_object_stores_cut(
    encrypted: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """At multiples of 8 MiB, whatever tensors stand there."""

    class Requests(MemorySource):
        def read_parts(self, offset: int, parts: Filling) -> None:
            self.requests.append((offset, offset + parts.length))
            super().read_parts(offset, parts)

        requests: list[tuple[int, int]]

    source = Requests(encrypted)
    source.requests = []
    found, _ = streamed(source, LoadOptions(connections=1), GivenKey(KEY, "test"))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    bounds = {bound for request in source.requests for bound in request}
    inner = [bound for bound in bounds if min(bounds) < bound < max(bounds)]
    assert len(inner) >= 3
    assert all(bound % (DEFAULTS.job_bytes // 2) == 0 for bound in inner)


def test_a_late_header_is_waited_for_with_all_buffers_full(tmp_path: Path) -> None:
    """Parts of a tensor whose header is on its way hold the buffers that its job needs as well."""
    written = {"first": torch.zeros(MIB, dtype=torch.uint8)}
    written["large"] = torch.randint(0, 256, (60 * MIB,), dtype=torch.uint8)
    path = tmp_path / "model.tensors"
    serializer = TensorSerializer(str(path), encryption=EncryptionParams(key=KEY))
    serializer.write_state_dict({name: tensor.clone() for name, tensor in written.items()})
    serializer.close()

    class FirstJobLast(MemorySource):
        others = threading.Semaphore(0)
        held = -1

        def read_parts(self, offset: int, parts: Filling) -> None:
            if offset == self.held:
                for _ in range(4):
                    assert self.others.acquire(timeout=30)
            super().read_parts(offset, parts)

        def read_into(self, offset: int, buffer: memoryview) -> None:
            super().read_into(offset, buffer)
            if offset >= DEFAULTS.job_bytes // 2:
                self.others.release()

    source = FirstJobLast(path.read_bytes())
    index = read_index(source)
    source.held = index.tensors[0].header_offset
    homes = {r.name: torch.empty(r.length, dtype=torch.uint8) for r in index.tensors}
    with TensorStream(
        source,
        index.tensors,
        encrypted=True,
        key=GivenKey(KEY, "test"),
        # Four buffers.
        options=LoadOptions(connections=8, ahead_bytes=MIB),
        progress=LoadProgress(),
        place=lambda record: homes[record.name],
    ) as stream:
        for record, tensor in stream:
            assert torch.equal(tensor, written[record.name])


def test_without_room_a_slow_connection_that_holds_all_is_helped(tmp_path: Path) -> None:
    """The consumer waits for the first tensor, and so all others do; its bytes are taken over."""
    written = {name: torch.randint(0, 256, (16 * MIB,), dtype=torch.uint8) for name in "ab"}
    path = tmp_path / "model.tensors"
    serializer = TensorSerializer(str(path), encryption=EncryptionParams(key=KEY))
    serializer.write_state_dict({name: tensor.clone() for name, tensor in written.items()})
    serializer.close()

    class FirstIsSlow(MemorySource):
        slow: int | None = None
        until = 0
        taken_over = threading.Event()

        def read_parts(self, offset: int, parts: Filling) -> None:
            if self.slow is None:
                self.slow, self.until = threading.get_ident(), offset + parts.length
            elif offset < self.until:
                self.taken_over.set()
            super().read_parts(offset, parts)

        def read_into(self, offset: int, buffer: memoryview) -> None:
            mine = self.slow == threading.get_ident() and offset < self.until
            if mine and offset > self.first and not self.taken_over.wait(20):
                raise SourceUnavailableError("nobody has helped")
            super().read_into(offset, buffer)

        first = 0

    source = FirstIsSlow(path.read_bytes())
    source.first = read_index(source).tensors[0].data_offset
    options = LoadOptions(connections=4, ahead_bytes=MIB)  # a tensor is let in alone
    found, _ = streamed(source, options, GivenKey(KEY, "test"))
    assert all(torch.equal(found[name], written[name]) for name in written)
    assert source.taken_over.is_set()
