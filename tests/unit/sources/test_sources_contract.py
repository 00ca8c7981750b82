"""What holds for every source, however it is reached: file, HTTP, clouds, what is fetched ahead.

S3 is SeaweedFS, Google's storage fake-gcs-server, the hub a stand-in of ours; Azure (Azurite) is
one of them in `make test-clouds`.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from s3server import S3Server

from azure_blobs import make_container, put_blob
from cloud_servers import Hub, azurite, gcs_server
from rangeserver import RangeServer
from s3_clients import s3_access, s3_client
from tensorserve.errors import CorruptError
from tensorserve.loading import LoadProgress
from tensorserve.loading.block_cache import BLOCK_BYTES, PRESENT, BlockCache
from tensorserve.loading.prefetch import PrefetchedSource
from tensorserve.sources import (
    Access,
    NotFoundError,
    ReplacedError,
    RetryPolicy,
    Source,
    open_source,
)
from tensorserve.sources.scatter_read import Filling
from waiting import wait_for

# One block that was fetched ahead, and a rest that was not.
SIZE = BLOCK_BYTES + 300_001
POLICY = RetryPolicy(attempts=3, deadline=5.0, stall_timeout=2.0, backoff_base=0.01)
KINDS = ("local", "http", "s3", "gs", "hf", "prefetched")
CLOUDS = ("az",) if os.environ.get("TEST_CLOUDS") else ()


@dataclass
class Stored:
    """An object, and how it is opened."""

    uri: str
    access: Access
    put: Callable[[bytes], object]
    data: bytes = field(repr=False)
    prefetched: bool = False
    fixed: bool = False
    """Whether what its URI names never changes: a commit of a hub."""

    def __post_init__(self) -> None:
        self.put(self.data)
        self.as_given = True

    def replace(self, other: bytes) -> None:
        """Put other bytes in its place, until the next test."""
        self.as_given = False
        self.put(other)

    def restore(self) -> None:
        """After a test that has replaced it."""
        if not self.as_given:
            self.put(self.data)
            self.as_given = True

    def open(self, uri: str | None = None) -> Source:
        """A fresh source; the first block is in memory where it is to be prefetched."""
        source = open_source(uri or self.uri, self.access)
        if not self.prefetched:
            return source
        shared = BlockCache.create(source.size, source.version, ranks=1)
        source.read_into(0, shared.block(0))
        shared.set_state(0, PRESENT)
        return PrefetchedSource(source, shared, 0, LoadProgress())


@pytest.fixture(scope="module")
def data() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture(scope="module", params=KINDS + CLOUDS)
def kept(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    data: bytes,
    s3: S3Server,
    bucket: str,
) -> Iterator[Stored]:
    """The same bytes behind each kind of source."""
    path = tmp_path_factory.mktemp("contract") / "model.tensors"
    kind = request.param
    if kind == "local":
        yield Stored(str(path), Access(policy=POLICY), path.write_bytes, data)
    elif kind == "s3":
        client = s3_client(s3)
        access = s3_access(s3)
        key = "contract/model.tensors"
        yield Stored(
            f"s3://{bucket}/{key}",
            Access(s3=access, policy=POLICY),
            lambda content: client.put_object(Bucket=bucket, Key=key, Body=content),
            data,
        )
    elif kind == "gs":
        with gcs_server() as gcs:
            gcs.make_bucket("models")
            yield Stored(
                "gs://models/contract/model.tensors",
                Access(gcs=gcs.access, policy=POLICY),
                lambda content: gcs.put("models", "contract/model.tensors", content),
                data,
            )
    elif kind == "az":
        with azurite() as azure:
            access = Access(azure=azure.access, policy=POLICY)
            make_container("models", access)
            uri = "az://models/contract/model.tensors"
            yield Stored(uri, access, lambda content: put_blob(uri, content, access), data)
    elif kind == "hf":
        with Hub("org/model") as hub:
            uri, access = "hf://org/model/model.tensors", Access(hub=hub.access, policy=POLICY)
            yield Stored(
                uri, access, lambda content: hub.put("model.tensors", content), data, fixed=True
            )
    else:
        with RangeServer(path.parent) as server:
            uri, access_to = f"{server.url}/model.tensors", Access(policy=POLICY)
            yield Stored(uri, access_to, path.write_bytes, data, prefetched=kind == "prefetched")


@pytest.fixture
def stored(kept: Stored) -> Iterator[Stored]:
    yield kept
    kept.restore()


@pytest.fixture
def source(stored: Stored) -> Iterator[Source]:
    opened = stored.open()
    yield opened
    opened.close()


def test_size_and_version_are_known_when_it_is_open(source: Source, stored: Stored) -> None:
    """The version is of the bytes: two sources of the same object agree."""
    assert source.size == SIZE
    assert source.version
    assert source.pinned
    again = stored.open()
    assert again.version == source.version
    again.close()


RANGES = (
    (0, 0),
    (0, 1),
    (1, 1000),
    (SIZE - 1, 1),
    (SIZE, 0),
    (BLOCK_BYTES - 5, 10),
    (BLOCK_BYTES, 300_001),
    (0, SIZE),
)


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_a_range_is_exact(source: Source, data: bytes, offset: int, length: int) -> None:
    """In memory of its own, in the caller's, and when it is asked for again."""
    wanted = data[offset : offset + length]
    assert source.read(offset, length) == wanted
    for read in (source.read_into, source.read_again):
        buffer = bytearray(length)
        read(offset, memoryview(buffer))
        assert buffer == wanted


def test_parts_come_in_order_one_after_the_other(source: Source, data: bytes) -> None:
    """Memory is asked for when a part begins; a part of no bytes is a part too."""
    lengths = [1000, 0, BLOCK_BYTES, 17]
    parts = [bytearray(length) for length in lengths]
    calls: list[tuple[str, int]] = []

    def memory(number: int) -> memoryview:
        calls.append(("begin", number))
        return memoryview(parts[number])

    def full(number: int) -> bool:
        calls.append(("full", number))
        return True

    source.read_parts(5, Filling(lengths, memory, full))
    assert b"".join(parts) == data[5 : 5 + sum(lengths)]
    assert [call for call in calls if call[0] == "full"] == [("full", n) for n in range(4)]
    assert calls.index(("begin", 2)) > calls.index(("full", 0))
    assert calls.index(("begin", 3)) > calls.index(("full", 2))


def test_what_is_not_wanted_is_left_unread(source: Source, data: bytes) -> None:
    """`on_part` says no: nothing after that part is asked for or written."""
    parts = [bytearray(1000), bytearray(1000), bytearray(1000)]
    wanted = Filling([1000] * 3, lambda n: memoryview(parts[n]), lambda n: n < 1)
    source.read_parts(BLOCK_BYTES - 1500, wanted)
    start = BLOCK_BYTES - 1500
    assert b"".join(parts) == data[start : start + 2000] + bytes(1000)


@pytest.mark.parametrize(("offset", "length"), [(SIZE - 1, 2), (SIZE, 1), (10 * SIZE, 1)])
def test_a_range_beyond_the_end_is_refused(source: Source, offset: int, length: int) -> None:
    """Not cut short."""
    with pytest.raises(CorruptError, match="beyond its end"):
        source.read(offset, length)


def test_many_threads_read_at_once(source: Source, data: bytes) -> None:
    """Each its own range."""
    step = SIZE // 12 + 1
    found: dict[int, bytes] = {}

    def read(start: int) -> None:
        found[start] = source.read(start, min(step, SIZE - start))

    threads = [threading.Thread(target=read, args=(start,)) for start in range(0, SIZE, step)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"".join(found[start] for start in sorted(found)) == data


@pytest.mark.parametrize("other_size", [SIZE, SIZE + 1])
def test_a_replaced_object_ends_the_read(stored: Stored, other_size: int) -> None:
    """Whether the new one has the same size or not; a new source has a new version."""
    if stored.fixed:
        pytest.skip("a commit never changes (test_sources_hub.py)")
    source = stored.open()
    assert source.read(BLOCK_BYTES, 10) == stored.data[BLOCK_BYTES:][:10]
    stored.replace(bytes(other_size))
    with pytest.raises(ReplacedError):
        source.read(BLOCK_BYTES + 1000, 100_000)
    again = stored.open()
    assert (again.size, again.read(BLOCK_BYTES, 10)) == (other_size, bytes(10))
    assert again.version != source.version
    again.close()
    source.close()


def test_a_missing_object_is_not_found(stored: Stored) -> None:
    """And named."""
    with pytest.raises(NotFoundError, match="none"):
        stored.open(stored.uri.replace("model.tensors", "none.tensors"))


def test_a_closed_source_holds_no_descriptor(stored: Stored) -> None:
    """Files and connections are given back; closing twice is closing once."""
    stored.open().close()  # what is opened once a process is open then

    def count() -> int:
        """Without the memory of what was fetched ahead, which is not the source's own."""
        held = 0
        for link in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):
                held += "memfd:" not in str(link.readlink())
        return held

    gc.collect()  # sources that other tests have left open
    before = count()
    source = stored.open()
    source.read(BLOCK_BYTES, 1000)
    assert count() > before
    source.close()
    source.close()
    wait_for(lambda: count() <= before)
