"""What is fetched ahead is taken from memory, once for all ranks; without it the load goes on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tensorizer import EncryptionParams, TensorSerializer

from tensorserve.bundle.keys import GivenKey
from tensorserve.errors import SourceUnavailableError
from tensorserve.format import read_index
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream, prefetch
from tensorserve.loading.block_cache import BLOCK_BYTES, REQUESTED, BlockCache
from tensorserve.loading.prefetch import PrefetchedSource, Prefetcher
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Filling, Source
from waiting import wait_for

MIB = 1024**2
KEY = bytes(range(32))


class CountedSource(Source):
    """A remote source over bytes; counts how often each megabyte is read."""

    remote = True
    pinned = True

    def __init__(self, data: bytes) -> None:
        self.name, self.size, self.version = "memory", len(data), "v1"
        self.data = data
        self.read_megabytes: Counter[int] = Counter()
        self.broken = False
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        return sum(self.read_megabytes.values())

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.broken:
            raise SourceUnavailableError("memory is gone")
        with self._lock:
            self.read_megabytes[offset // MIB] += len(buffer)
        buffer[:] = self.data[offset : offset + len(buffer)]

    def read_parts(self, offset: int, parts: Filling) -> None:
        while not parts.finished:
            wanted = parts.wanted
            self.read_into(offset + parts.done, wanted)
            parts.add(len(wanted))

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]

    def passed(self, offset: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [5 * MIB, 100, 9 * MIB + 17, 3 * MIB, 30 * MIB, 1, 12 * MIB]
    return {
        f"t{n}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for n, size in enumerate(sizes)
    }


@pytest.fixture(scope="module")
def encrypted(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("prefetch") / "model.tensors"
    serializer = TensorSerializer(str(path), encryption=EncryptionParams(key=KEY))
    serializer.write_state_dict(tensors)
    serializer.close()
    return path.read_bytes()


def load(source: PrefetchedSource, *names: str) -> dict[str, torch.Tensor]:
    """All tensors, or those that are named."""
    index = read_index(source)
    with TensorStream(
        source,
        [record for record in index.tensors if not names or record.name in names],
        encrypted=True,
        key=GivenKey(KEY, "test"),
        options=LoadOptions(connections=4, ahead_bytes=64 * MIB),
        progress=LoadProgress(),
    ) as stream:
        loaded = {record.name: tensor.clone() for record, tensor in stream}
    source.close()
    return loaded


@contextmanager
def fetching(source: CountedSource, shared: BlockCache, budget: int) -> Iterator[Prefetcher]:
    """The fetcher, in a thread and with a descriptor of its own."""
    fetcher = Prefetcher(source, shared.reopen(), budget, LoadProgress())
    thread = threading.Thread(target=fetcher.run)
    thread.start()
    while not shared.held:
        pass
    yield fetcher
    shared.stop()
    thread.join(10)
    assert not thread.is_alive()


def is_there(shared: BlockCache, block: int) -> bool:
    return shared.state(block) == 2


def same(loaded: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == tensors.keys() and all(
        torch.equal(loaded[name], tensors[name]) for name in tensors
    )


def test_what_came_damaged_into_memory_is_read_from_the_source(
    encrypted: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """F8: the memory would give the same damage a second time."""
    record = next(r for r in read_index(CountedSource(encrypted)).tensors if r.name == "t4")
    for place in (record.data_offset + 7 * MIB, record.header_offset + record.header_length // 2):
        damaged = bytearray(encrypted)
        damaged[place] ^= 4
        source = CountedSource(bytes(damaged))
        shared = BlockCache.create(source.size, source.version, 1)
        with fetching(source, shared, len(encrypted) + BLOCK_BYTES):
            wait_for(lambda: all(is_there(shared, b) for b in range(shared.blocks)))  # noqa: B023
        whole = CountedSource(encrypted)
        assert same(load(PrefetchedSource(whole, shared, 0, LoadProgress())), tensors)
        assert 0 < whole.bytes_read < 5 * MIB


def test_what_was_fetched_ahead_is_not_fetched_again(
    encrypted: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """All of it is there: the loader sends no request. The memory goes as it is used."""
    source = CountedSource(encrypted)
    shared = BlockCache.create(source.size, source.version, ranks=1)
    with fetching(source, shared, budget=1024 * MIB):
        wait_for(lambda: all(is_there(shared, n) for n in range(shared.blocks)))
        assert source.bytes_read == source.size
        assert same(load(PrefetchedSource(source, shared, 0, LoadProgress())), tensors)
    assert source.bytes_read == source.size
    assert all(shared.state(n) == 0 for n in range(shared.blocks))


def test_the_loader_goes_on_where_the_fetcher_came_to(
    encrypted: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """With room for two blocks: the rest comes from the source, and only the rest."""
    source = CountedSource(encrypted)
    shared = BlockCache.create(source.size, source.version, ranks=1)
    with fetching(source, shared, budget=2 * BLOCK_BYTES):
        wait_for(lambda: is_there(shared, 0) and is_there(shared, 1))
        assert source.bytes_read == 2 * BLOCK_BYTES
        assert same(load(PrefetchedSource(source, shared, 0, LoadProgress())), tensors)
    assert source.bytes_read < source.size + MIB


def test_two_ranks_share_what_comes_over_the_network(
    encrypted: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """No byte is fetched twice, and never more is kept than the budget."""
    source = CountedSource(encrypted)
    shared = BlockCache.create(source.size, source.version, ranks=2)
    results: dict[int, dict[str, torch.Tensor]] = {}

    def rank(number: int) -> None:
        results[number] = load(PrefetchedSource(source, shared.reopen(), number, LoadProgress()))

    with fetching(source, shared, budget=3 * BLOCK_BYTES):
        threads = [threading.Thread(target=rank, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert same(results[0], tensors)
    assert same(results[1], tensors)
    assert source.bytes_read == source.size
    assert all(shared.state(n) == 0 for n in range(shared.blocks))


def test_ranks_that_skip_parts_of_the_file_do_not_wait_for_them(
    encrypted: bytes, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than what the fetcher may hold, its beginning too: it goes on where the ranks are."""
    monkeypatch.setattr(
        prefetch, "DEFAULTS", replace(DEFAULTS, prefetch_wait_seconds=600.0)
    )  # the test would end before it
    source = CountedSource(encrypted)
    shared = BlockCache.create(len(encrypted), "v1", 2)
    wanted = ("t4", "t6")
    with fetching(source, shared, 2 * BLOCK_BYTES):
        results = {}

        def rank(number: int) -> None:
            own = PrefetchedSource(source, shared.reopen(), number, LoadProgress())
            results[number] = load(own, *wanted)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    for loaded in results.values():
        assert same(loaded, {name: tensors[name] for name in wanted})


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fetcher_that_died_leaves_the_work_to_the_loader(
    encrypted: bytes, tensors: dict[str, torch.Tensor], ranks: int
) -> None:
    """Blocks that it had begun are not waited for."""
    source = CountedSource(encrypted)
    shared = BlockCache.create(source.size, source.version, ranks=ranks)
    shared.set_state(0, 1)
    shared.set_state(3, 1)
    assert not shared.held
    for rank in range(ranks):
        loaded = load(PrefetchedSource(source, shared.reopen(), rank, LoadProgress()))
        assert same(loaded, tensors)


def test_a_fetcher_whose_source_fails_ends_without_a_word(
    encrypted: bytes, tensors: dict[str, torch.Tensor]
) -> None:
    """The loader asks for the same bytes, and its error is the one that is read."""
    source = CountedSource(encrypted)
    source.broken = True
    shared = BlockCache.create(source.size, source.version, ranks=2)
    fetcher = Prefetcher(source, shared.reopen(), 64 * MIB, LoadProgress())
    fetcher.run()
    del fetcher
    source.broken = False
    loaded = load(PrefetchedSource(source, shared, 0, LoadProgress()))
    assert same(loaded, tensors)


def test_a_rank_that_hangs_does_not_hold_up_the_other(
    encrypted: bytes, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetcher waits for room that never comes; the rank fetches the rest itself."""
    monkeypatch.setattr(prefetch, "DEFAULTS", replace(DEFAULTS, prefetch_wait_seconds=0.3))
    source = CountedSource(encrypted)
    shared = BlockCache.create(source.size, source.version, ranks=2)
    with fetching(source, shared, budget=2 * BLOCK_BYTES):
        assert same(load(PrefetchedSource(source, shared, 0, LoadProgress())), tensors)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_slow_connection_of_the_fetcher_delays_nothing(
    encrypted: bytes, tensors: dict[str, torch.Tensor], ranks: int
) -> None:
    """What it holds is read past it, and only that."""
    hung, go_on = threading.Event(), threading.Event()

    class OneHangs(CountedSource):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset == 2 * BLOCK_BYTES:
                hung.set()
                assert go_on.wait(30)
            super().read_into(offset, buffer)

    own = CountedSource(encrypted)
    shared = BlockCache.create(own.size, own.version, ranks=ranks)
    with fetching(OneHangs(encrypted), shared, budget=64 * MIB):
        wait_for(lambda: all(is_there(shared, n) for n in range(shared.blocks) if n != 2))
        assert hung.is_set()
        assert same(load(PrefetchedSource(own, shared, 0, LoadProgress())), tensors)
        assert shared.state(2) == REQUESTED
        go_on.set()
    assert set(own.read_megabytes) == set(range(2 * BLOCK_BYTES // MIB, 3 * BLOCK_BYTES // MIB))


def test_memory_of_another_version_is_not_used(encrypted: bytes) -> None:
    """The object may have been replaced between the fetcher and the loader."""
    source = CountedSource(encrypted)
    assert BlockCache.create(source.size, "v1", ranks=1).fits(source)
    assert not BlockCache.create(source.size, "v2", ranks=1).fits(source)
    assert not BlockCache.create(source.size + 1, "v1", ranks=1).fits(source)


class BusySource(CountedSource):
    """Counts how many read at once; each read takes a moment."""

    most = now = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        super().read_into(offset, buffer)
        with self._lock:
            self.now -= 1


@pytest.mark.parametrize("connections", [1, 3, None])
def test_as_many_connections_as_the_user_says(encrypted: bytes, connections: int | None) -> None:
    """TENSORSERVE_FETCH_CONNECTIONS is for fetching ahead as well."""
    source = BusySource(encrypted)
    shared = BlockCache.create(source.size, source.version, 1)
    fetcher = Prefetcher(source, shared.reopen(), 64 * MIB, LoadProgress(), connections)
    thread = threading.Thread(target=fetcher.run)
    thread.start()
    wait_for(lambda: all(is_there(shared, block) for block in range(shared.blocks)))
    shared.stop()
    thread.join(10)
    assert source.most == connections if connections else source.most >= 2
