"""tensorizer's own reader over our sources: the same tensors as ours, the same errors, no more.

The samples are those of all released tensorizers (unit/format/files).
"""

from __future__ import annotations

import gc
import gzip
import hashlib
import json
import math
import random
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensorizer
import torch
from tensorizer import EncryptionParams, TensorSerializer
from test_loading_prefetch import CountedSource, fetching

from rangeserver import Fault, RangeServer
from tensorserve.bundle.keys import GivenKey, parse_passphrase
from tensorserve.bundle.tensors_file import OpenTensors, open_tensors
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    SourceUnavailableError,
    TensorserveError,
    WrongKeyError,
)
from tensorserve.format import ITEM_SIZES, FileKey, TensorRecord, read_index
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream, prefetch
from tensorserve.loading.block_cache import BlockCache
from tensorserve.loading.prefetch import PrefetchedSource
from tensorserve.loading.reference import ReferenceStream
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.secret import Secret
from tensorserve.sources import Access, ReplacedError, RetryPolicy, Source
from tensorserve.sources.local import LocalSource
from waiting import wait_for

MIB = 1024**2
FILES = Path(__file__).parents[1] / "format" / "files"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FILES / "expected.json").read_text())
KEY = bytes(range(32))
PASSPHRASE = "correct horse battery staple"
OPTIONS = LoadOptions(connections=2, ahead_bytes=64 * MIB)
IMPATIENT = Access(policy=RetryPolicy(attempts=3, backoff_base=0.01, stall_timeout=2.0))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """However a load ended, its threads end too, tensorizer's included."""
    yield
    ours = ("tensorserve", "TensorDeserializerCopy", "TensorizerDecryption")
    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith(ours)])


def key_of(sealing: str) -> FileKey | None:
    if sealing == "passphrase":
        return parse_passphrase(Secret(PASSPHRASE))
    return GivenKey(KEY, "the test") if sealing == "key" else None


def opened(uri: str, key: FileKey | None, progress: LoadProgress) -> OpenTensors:
    return open_tensors(uri, IMPATIENT, key, observer=progress)


def by_reference(
    uri: str,
    key: FileKey | None,
    *,
    options: LoadOptions = OPTIONS,
    choose: Callable[[TensorRecord], bool] = lambda _: True,
    wrap: Callable[[Source], Source] = lambda source: source,
    progress: LoadProgress | None = None,
) -> dict[str, torch.Tensor]:
    """{name: tensor} as the reference reader gives them."""
    progress = progress or LoadProgress()
    file = opened(uri, key, progress)
    try:
        records = [record for record in file.index.tensors if choose(record)]
        with ReferenceStream(
            wrap(file.source),
            file.index,
            records,
            key=file.key,
            options=options,
            progress=progress,
        ) as stream:
            found = {record.name: tensor for record, tensor in stream}
        assert list(found) == [record.name for record in records]
        return found
    finally:
        file.source.close()


def by_ours(
    uri: str, key: FileKey | None, choose: Callable[[TensorRecord], bool]
) -> dict[str, torch.Tensor]:
    """{name: tensor} as our loader gives them."""
    file = opened(uri, key, LoadProgress())
    try:
        with TensorStream(
            file.source,
            [record for record in file.index.tensors if choose(record)],
            encrypted=file.index.encrypted,
            key=file.key,
            options=OPTIONS,
            progress=LoadProgress(),
        ) as stream:
            return {record.name: tensor for record, tensor in stream}
    finally:
        file.source.close()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Names, order, dtypes, shapes and bytes."""
    return list(one) == list(other) and all(
        mine.dtype == theirs.dtype
        and mine.shape == theirs.shape
        and bits(mine) == bits(theirs)
        and type(mine) is torch.Tensor
        and not mine.requires_grad
        for mine, theirs in zip(one.values(), other.values(), strict=True)
    )


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


# What released tensorizers wrote ---------------------------------------------------------------


def bearable(record: TensorRecord) -> bool:
    """Not the sample's tensor of 16 GiB, which has a shape and no data."""
    return math.prod(record.shape) * ITEM_SIZES[record.dtype] < 2**30


@pytest.mark.parametrize("name", EXPECTED)
def test_samples_of_all_tensorizers_are_as_with_our_loader(name: str, tmp_path: Path) -> None:
    """Plain, key, passphrase, chunks, meta, opaque, nested, long; from disk and over HTTP."""
    expected = EXPECTED[name]
    if expected["data_version"] > tensorizer.serialization.TENSORIZER_VERSION:
        pytest.skip(f"tensorizer {tensorizer.__version__} does not know this version of the format")
    path = tmp_path / name
    path.write_bytes(gzip.decompress((FILES / f"{name}.gz").read_bytes()))
    key = key_of(expected["sealing"])
    wanted = by_ours(str(path), key, bearable)
    hashes = replace(OPTIONS, verify_hashes=True)
    with RangeServer(tmp_path) as server:
        over_http = by_reference(f"{server.url}/{name}", key, options=hashes, choose=bearable)
    assert same(by_reference(str(path), key, options=hashes, choose=bearable), wanted)
    assert same(over_http, wanted)
    digests = {n: hashlib.sha256(bits(tensor)).hexdigest() for n, tensor in wanted.items()}
    stated = {t["name"]: t["sha256"] for t in expected["tensors"] if not t["meta"]}
    assert stated.items() <= digests.items()


# A file of some size ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Around the edges of cipher chunks and of what is fetched at once, and none at all."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"one": 1, "odd": 1001, "chunk": 2 * MIB, "and_one": 2 * MIB + 1, "long": 9 * MIB + 17}
    made = {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for name, size in sizes.items()
    }
    made["shaped"] = torch.randn(3, 5, 7, generator=generator).to(torch.bfloat16)
    made["scalar"] = torch.tensor(2.5)
    return made | {"empty": torch.empty(0, 4), "last": made["chunk"] + 1}


def equal(found: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
    """Whether those are all of the tensors that the file has."""
    expected = tensors.keys() - ({"empty"} - found.keys())
    return found.keys() == expected and all(torch.equal(found[n], tensors[n]) for n in found)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> Path:
    """sealed.tensors, under KEY, and plain.tensors."""
    folder = tmp_path_factory.mktemp("files")
    for name, params in {"sealed": EncryptionParams(key=KEY), "plain": None}.items():
        serializer = TensorSerializer(str(folder / f"{name}.tensors"), encryption=params)
        # tensorizer cannot seal what is empty.
        content = {n: t.clone() for n, t in tensors.items() if t.numel() or params is None}
        serializer.write_state_dict(content)
        serializer.close()
    return folder


@pytest.fixture
def server(directory: Path) -> Iterator[RangeServer]:
    with RangeServer(directory) as running:
        yield running


@pytest.fixture
def sealed() -> FileKey:
    return GivenKey(KEY, "the test")


def record_of(path: Path, name: str) -> TensorRecord:
    source = LocalSource(path)
    try:
        return next(record for record in read_index(source).tensors if record.name == name)
    finally:
        source.close()


@pytest.mark.parametrize("ahead", [1, 5 * MIB, 1024 * MIB])
@pytest.mark.parametrize("connections", [None, 1, 16])
def test_whatever_memory_and_connections_there_are(
    server: RangeServer,
    tensors: dict[str, torch.Tensor],
    sealed: FileKey,
    connections: int | None,
    ahead: int,
) -> None:
    """Also where the budget is smaller than any tensor; and the bytes are counted."""
    progress = LoadProgress()
    options = LoadOptions(connections=connections, ahead_bytes=ahead)
    found = by_reference(f"{server.url}/sealed.tensors", sealed, options=options, progress=progress)
    assert equal(found, tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    counts = progress.snapshot()
    assert (counts.fetch, counts.decrypt) == (total, total)
    assert counts.fetch_seconds > 0
    assert counts.decrypt_seconds > 0
    assert counts.requests == len(server.requests)
    assert counts.retries == {}


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "http"])
@pytest.mark.parametrize("kind", ["sealed", "plain"])
def test_some_of_the_tensors(
    server: RangeServer,
    directory: Path,
    tensors: dict[str, torch.Tensor],
    kind: str,
    remote: bool,
) -> None:
    """What is left out in the middle is not read."""
    key = GivenKey(KEY, "the test") if kind == "sealed" else None
    uri = f"{server.url if remote else directory}/{kind}.tensors"
    chance = random.Random(5)
    for _ in range(8):
        names = sorted(tensors.keys() - ({"empty"} if kind == "sealed" else set()))
        chosen = set(chance.sample(names, 4))
        progress = LoadProgress()
        found = by_reference(
            uri, key, choose=lambda r, chosen=chosen: r.name in chosen, progress=progress
        )
        assert found.keys() == chosen
        assert all(torch.equal(found[name], tensors[name]) for name in chosen)
        fetched = progress.snapshot().fetch
        assert fetched == sum(tensors[name].nbytes for name in chosen)
        if "long" not in chosen and not remote:
            assert progress.received_bytes() < fetched + 9 * MIB


def test_nothing_that_was_handed_out_is_kept(directory: Path, sealed: FileKey) -> None:
    """tensorizer keeps every tensor it gave: a second model in memory."""
    file = opened(str(directory / "sealed.tensors"), sealed, LoadProgress())
    alive: list[weakref.ref[torch.Tensor]] = []
    with ReferenceStream(
        file.source,
        file.index,
        file.index.tensors,
        key=file.key,
        options=OPTIONS,
        progress=LoadProgress(),
    ) as stream:
        for _, tensor in stream:
            alive.append(weakref.ref(tensor.untyped_storage()))
            del tensor
            gc.collect()
            # tensorizer's thread and generator still name the last ones.
            assert sum(ref() is not None for ref in alive) <= 3
    file.source.close()


def test_no_more_than_the_budget_is_on_its_way(tmp_path: Path) -> None:
    """tensorizer's queue has no end: a slow model would find the whole file in memory."""
    count, limit = 64, 16
    path = tmp_path / "many.tensors"
    serializer = TensorSerializer(str(path))
    serializer.write_state_dict(
        {f"{n:03}": torch.full((MIB,), n, dtype=torch.uint8) for n in range(count)}
    )
    serializer.close()
    progress = LoadProgress()
    file = opened(str(path), None, progress)
    before = progress.received_bytes()
    with ReferenceStream(
        file.source,
        file.index,
        file.index.tensors,
        key=None,
        options=LoadOptions(ahead_bytes=limit * MIB),
        progress=progress,
    ) as stream:
        tensors = iter(stream)
        next(tensors)
        held = limit - limit // 4
        wait_for(lambda: progress.received_bytes() - before >= held * MIB)
        threading.Event().wait(0.2)  # it would go on
        assert progress.received_bytes() - before < (held + 1) * MIB
        assert len(list(tensors)) == count - 1
    file.source.close()


def test_a_consumer_that_stops_early_ends_it(server: RangeServer, sealed: FileKey) -> None:
    """vLLM may raise in the middle of a load; the fixture sees that no thread is left."""
    for uri in (f"{server.url}/sealed.tensors", str(server.directory / "sealed.tensors")):
        file = opened(uri, sealed, LoadProgress())
        with ReferenceStream(
            file.source,
            file.index,
            file.index.tensors,
            key=file.key,
            options=LoadOptions(ahead_bytes=1),
            progress=LoadProgress(),
        ) as stream:
            next(iter(stream))
        file.source.close()


# The headers -----------------------------------------------------------------------------------


def digest_of_headers(path: Path) -> str:
    source = LocalSource(path)
    headers = [source.read(r.header_offset, r.header_length) for r in read_index(source).tensors]
    source.close()
    return hashlib.sha256(b"".join(headers)).hexdigest()


@pytest.mark.parametrize("chosen", [lambda _: True, lambda r: r.name in {"odd", "long"}])
def test_headers_are_those_of_the_manifest_or_the_load_ends(
    directory: Path, sealed: FileKey, chosen: Callable[[TensorRecord], bool]
) -> None:
    """Those of tensors that are left out count too, and the last tensor is not handed out."""
    path = directory / "sealed.tensors"
    file = opened(str(path), sealed, LoadProgress())
    left_out = tuple(r for r in file.index.tensors if not chosen(r))
    file.source.close()
    right = replace(OPTIONS, headers_sha256=digest_of_headers(path), left_out=left_out)
    assert by_reference(str(path), sealed, options=right, choose=chosen)
    with pytest.raises(CorruptError, match="not those of the manifest"):
        by_reference(
            str(path), sealed, options=replace(right, headers_sha256="0" * 64), choose=chosen
        )


def test_tensorizer_sees_no_header_that_was_not_checked(
    directory: Path, tmp_path: Path, sealed: FileKey
) -> None:
    """It believes the length in it: this one asks for 2^50 bytes."""
    record = record_of(directory / "sealed.tensors", "long")
    data = bytearray((directory / "sealed.tensors").read_bytes())
    data[record.header_offset : record.header_offset + 8] = struct.pack("<Q", 2**50)
    (tmp_path / "lies.tensors").write_bytes(data)
    with pytest.raises(CorruptError, match="header of tensor 'long'"):
        by_reference(str(tmp_path / "lies.tensors"), sealed)


def test_tensorizer_reads_the_index_that_was_checked(
    directory: Path, tmp_path: Path, sealed: FileKey
) -> None:
    """Between the check and the load the file became another one, where no version says so."""
    path = tmp_path / "changing.tensors"
    path.write_bytes((directory / "sealed.tensors").read_bytes())

    class Exchanged(Spoilt):
        def read(self, offset: int, length: int) -> bytes:
            data = bytearray(length)
            self.read_into(offset, memoryview(data))
            return bytes(data)

    with pytest.raises(ReplacedError, match="its index is another one"):
        by_reference(str(path), sealed, wrap=lambda s: Exchanged(s, [40], 9))


# Faults of the network -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", times=3, after=100_000, beyond=MIB),
        Fault("short", times=3, after=100_000, beyond=MIB),
        Fault("status", times=2, beyond=MIB, headers={"Retry-After": "0"}),
        Fault("wrong_range", times=2, beyond=MIB),
    ],
    ids=lambda fault: fault.kind,
)
def test_a_fault_that_passes_is_survived(
    server: RangeServer, tensors: dict[str, torch.Tensor], sealed: FileKey, fault: Fault
) -> None:
    """By the sources' own retry, which counts it."""
    server.faults = [replace(fault)]
    progress = LoadProgress()
    found = by_reference(f"{server.url}/sealed.tensors", sealed, progress=progress)
    assert equal(found, tensors)
    assert server.fired[fault.kind] == fault.times
    assert sum(progress.snapshot().retries.values()) == fault.times


def test_a_source_that_stays_away_ends_the_load_with_its_error(
    server: RangeServer, sealed: FileKey
) -> None:
    """69, and nothing of tensorizer's."""
    server.faults = [Fault("status", times=1000, beyond=MIB)]
    with pytest.raises(SourceUnavailableError, match="503"):
        by_reference(f"{server.url}/sealed.tensors", sealed)


def test_an_object_that_is_replaced_ends_the_load(server: RangeServer, sealed: FileKey) -> None:
    """65; never a mixture of two."""
    server.faults = [Fault("changed", beyond=MIB)]
    with pytest.raises(ReplacedError, match="was replaced while it was read"):
        by_reference(f"{server.url}/sealed.tensors", sealed)
    assert server.fired["changed"] == 1


def test_a_file_that_is_cut_while_it_is_read_ends_the_load(
    directory: Path, tmp_path: Path, sealed: FileKey
) -> None:
    """tensorizer does not look at how many bytes it got."""
    path = tmp_path / "cut.tensors"
    path.write_bytes((directory / "sealed.tensors").read_bytes())

    def cut(source: Source) -> Source:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - MIB)
        return source

    with pytest.raises(ReplacedError):
        by_reference(str(path), sealed, wrap=cut)


# Damage ----------------------------------------------------------------------------------------


class Spoilt:
    """A source some of whose bytes are damaged, the first `times` times that they are read."""

    def __init__(self, source: Source, places: list[int], times: int = 1) -> None:
        self._source = source
        self._left = dict.fromkeys(places, times)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._source.read_into(offset, buffer)
        for place, times in self._left.items():
            if offset <= place < offset + len(buffer) and times:
                self._left[place] -= 1
                buffer[place - offset] ^= 1

    read_again = read_into


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "http"])
@pytest.mark.parametrize("kind", ["sealed", "plain"])
def test_what_is_damaged_on_the_wire_is_read_once_more(
    server: RangeServer,
    directory: Path,
    tensors: dict[str, torch.Tensor],
    kind: str,
    remote: bool,
) -> None:
    """In data of several tensors, the first and the last among them, and in headers."""
    key = GivenKey(KEY, "the test") if kind == "sealed" else None
    path = directory / f"{kind}.tensors"
    uri = f"{server.url}/{kind}.tensors" if remote else str(path)
    options = replace(OPTIONS, verify_hashes=True)
    records = [record_of(path, name) for name in ("one", "long", "last")]
    data = [record.end - 1 for record in records]
    in_headers = [record.header_offset + record.header_length // 2 for record in records]
    lengths = [record.header_offset for record in records]
    for places in (data, in_headers, lengths):
        progress = LoadProgress()
        found = by_reference(
            uri,
            key,
            options=options,
            wrap=lambda source, places=places: Spoilt(source, places),  # type: ignore[misc]
            progress=progress,
        )
        assert equal(found, tensors)
        # What was fetched ahead is read anew as well where the load goes on after a damaged tensor.
        retries = progress.snapshot().retries
        assert retries == {"corrupt": 3} or (remote and 0 < retries["corrupt"] < 3)
        assert progress.snapshot().fetch == sum(t.nbytes for t in tensors.values())


def test_a_flipped_bit_at_rest_ends_the_load(
    directory: Path, tmp_path: Path, sealed: FileKey
) -> None:
    """65, naming the tensor; those before it were handed out."""
    record = record_of(directory / "sealed.tensors", "long")
    data = bytearray((directory / "sealed.tensors").read_bytes())
    data[record.data_offset + 5 * MIB] ^= 4
    path = tmp_path / "damaged.tensors"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"'long'.*fails authentication") as caught:
        by_reference(str(path), sealed)
    assert caught.value.exit_code == 65


def test_a_flipped_bit_of_a_plain_file_is_seen_with_hashes_alone(
    directory: Path, tmp_path: Path
) -> None:
    """TENSORSERVE_VERIFY=hashes; without it nothing could tell, as with our loader."""
    record = record_of(directory / "plain.tensors", "long")
    data = bytearray((directory / "plain.tensors").read_bytes())
    data[record.data_offset] ^= 4
    path = tmp_path / "damaged.tensors"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"'long'.*does not have the hash"):
        by_reference(str(path), None, options=replace(OPTIONS, verify_hashes=True))
    assert by_reference(str(path), None)


def test_damage_to_a_header_is_refused_or_harmless(
    directory: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], sealed: FileKey
) -> None:
    """Every refusal is ours."""
    record = record_of(directory / "sealed.tensors", "and_one")
    whole = (directory / "sealed.tensors").read_bytes()
    path = tmp_path / "damaged.tensors"
    refused = 0
    for bit in range(0, 8 * record.header_length, 37):
        data = bytearray(whole)
        data[record.header_offset + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = by_reference(str(path), sealed, choose=lambda r: r.name == "and_one")
        except CorruptError:
            refused += 1
        else:
            assert torch.equal(found["and_one"], tensors["and_one"]), bit
    assert refused > 20


def test_a_wrong_key_is_said_before_anything_is_read(directory: Path) -> None:
    """65, as with our loader: the key is proven when the file is opened."""
    with pytest.raises(WrongKeyError):
        by_reference(str(directory / "sealed.tensors"), GivenKey(bytes(32), "the test"))


def test_a_wrong_key_that_was_not_proven_opens_nothing(directory: Path, sealed: FileKey) -> None:
    """65 all the same."""
    file = opened(str(directory / "sealed.tensors"), sealed, LoadProgress())
    stream = ReferenceStream(
        file.source,
        file.index,
        file.index.tensors,
        key=GivenKey(bytes(32), "the test"),
        options=OPTIONS,
        progress=LoadProgress(),
    )
    with pytest.raises(CorruptError, match="another file's"), stream:
        next(iter(stream))
    file.source.close()


def test_a_passphrase_is_derived_once_and_by_our_rules(tmp_path: Path) -> None:
    """tensorizer would derive whatever a forged file asks for."""
    sealing = EncryptionParams.from_string(
        PASSPHRASE,
        opslimit=EncryptionParams.OpsLimit.MIN,
        memlimit=EncryptionParams.MemLimit.MIN,
    )
    path = tmp_path / "passphrase.tensors"
    serializer = TensorSerializer(str(path), encryption=sealing)
    serializer.write_state_dict({f"t{n}": torch.full((3,), n) for n in range(5)})
    serializer.close()
    asked = []

    class Counted:
        origin = "the test"

        def for_header(self, header: Any) -> bytes:
            asked.append(header.key_derivation)
            return inner.for_header(header)

    inner = parse_passphrase(Secret(PASSPHRASE))
    found = by_reference(str(path), Counted())
    assert [int(tensor[0]) for tensor in found.values()] == list(range(5))
    assert None not in asked
    assert len(inner._derived) == 1


# What is tensorizer's own ----------------------------------------------------------------------


def test_what_tensorizer_cannot_read_is_said_with_the_way_out(
    directory: Path, sealed: FileKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exceptions are of many kinds; none comes out as it is."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("Conflicting tensor paths")

    monkeypatch.setattr(tensorizer.TensorDeserializer, "_to_torch_parameter", refuse)
    with pytest.raises(TensorserveError, match="Conflicting tensor paths") as caught:
        by_reference(str(directory / "sealed.tensors"), sealed)
    assert caught.value.exit_code == 70
    assert "TENSORSERVE_LOADER=auto" in str(caught.value)


def test_without_libsodium_it_says_so(
    directory: Path, sealed: FileKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own cipher needs none: the file could be loaded."""
    monkeypatch.setattr("tensorizer._crypt.available", False)
    with pytest.raises(ConfigurationError, match="libsodium"):
        by_reference(str(directory / "sealed.tensors"), sealed)
    assert by_reference(str(directory / "plain.tensors"), None)


def test_its_threads_run_where_ours_do_and_the_caller_stays(
    directory: Path, sealed: FileKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM binds its worker to some processors, and tensorizer's threads are made there."""
    moved: list[tuple[str, frozenset[int]]] = []
    monkeypatch.setattr(
        "tensorserve.loading.reference_reading.run_on",
        lambda processors: moved.append((threading.current_thread().name, processors)),
    )
    options = replace(OPTIONS, processors=frozenset({0, 1}))
    by_reference(str(directory / "sealed.tensors"), sealed, options=options)
    assert moved == [("TensorDeserializerCopy_0", frozenset({0, 1}))]


class Device:
    """A GPU, as far as these tests go: what was asked of it, in order, by which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, object]] = []
        monkeypatch.setattr(torch.cuda, "set_device", lambda d: self.asked.append(("set", d)))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda d: f"consumer's on {d}")
        monkeypatch.setattr(
            torch.accelerator, "empty_host_cache", lambda: self.asked.append(("let go of", "pages"))
        )

    def tensor(self, tensor: torch.Tensor) -> Any:
        """`tensor`, which says that it is on the GPU."""
        asked = self.asked

        class OnDevice:
            is_cuda = True
            device = torch.device("cuda", 3)
            dtype, shape = tensor.dtype, tensor.shape

            def record_stream(self, stream: str) -> None:
                asked.append(("used by", stream))

        return OnDevice()


def test_on_a_gpu_its_own_device_is_used_without_overwriting(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only a GPU would show: a context on GPU 0, and memory used again too early."""
    gpu = Device(monkeypatch)
    made: dict[str, Any] = {}
    real = tensorizer.TensorDeserializer

    class OnGpu(real):  # type: ignore[misc, valid-type]
        _preload_cuda_called = False

        def __init__(self, file: Any, *, device: torch.device, **options: Any) -> None:
            made["device"], made["preloaded"] = device, OnGpu._preload_cuda_called
            super().__init__(file, device="cpu", **options)

        def _to_torch_parameter(self, tensor: torch.Tensor) -> Any:
            return type("Parameter", (), {"data": gpu.tensor(tensor)})()

    monkeypatch.setattr(tensorizer, "TensorDeserializer", OnGpu)
    file = opened(str(directory / "plain.tensors"), None, LoadProgress())
    records = [record for record in file.index.tensors if record.name in {"odd", "long"}]
    with ReferenceStream(
        file.source,
        file.index,
        records,
        key=None,
        options=OPTIONS,
        progress=LoadProgress(),
        device=torch.device("cuda"),
    ) as stream:
        for number, _ in enumerate(stream, 1):
            assert gpu.asked.count(("used by", "consumer's on cuda:3")) == number
    file.source.close()
    assert made == {"device": torch.device("cuda", 3), "preloaded": True}
    assert gpu.asked[0] == ("set", torch.device("cuda", 3))
    assert gpu.asked[-1] == ("let go of", "pages")
    assert len(gpu.asked) == 1 + len(records) + 1


def test_ranks_that_share_what_is_fetched_fetch_it_once(
    directory: Path, tensors: dict[str, torch.Tensor], sealed: FileKey
) -> None:
    """Each is past a byte when it has taken it, so that the fetcher goes on."""
    data = (directory / "sealed.tensors").read_bytes()
    source = CountedSource(data)
    index = read_index(source)
    shared = BlockCache.create(source.size, source.version, 2)
    found: list[dict[str, torch.Tensor]] = []

    def load(rank: int) -> None:
        progress = LoadProgress()
        mine = PrefetchedSource(source, shared.reopen(), rank, progress)
        with ReferenceStream(
            mine,
            index,
            index.tensors,
            key=sealed,
            options=LoadOptions(ahead_bytes=8 * MIB),
            progress=progress,
        ) as stream:
            found.append({record.name: tensor for record, tensor in stream})
        mine.close()

    # Less than the file: it goes on only as both ranks do.
    with fetching(source, shared, 10 * MIB):
        ranks = [threading.Thread(target=load, args=(rank,)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(20)
    assert [equal(loaded, tensors) for loaded in found] == [True, True]
    assert source.bytes_read == len(data)


@pytest.mark.parametrize("first", [True, False], ids=["the beginning", "the end"])
def test_what_ranks_leave_out_does_not_stop_their_fetcher(
    directory: Path,
    sealed: FileKey,
    monkeypatch: pytest.MonkeyPatch,
    first: bool,
) -> None:
    """It brings a file's end only when all ranks are past its beginning: who waits gives it up."""
    path = directory / "sealed.tensors"
    source = CountedSource(path.read_bytes())
    index = read_index(source)
    by_size = sorted(index.tensors, key=lambda record: record.length)
    wanted = [r for r in index.tensors if r is (index.tensors[0] if first else by_size[-1])]
    left_out = tuple(record for record in index.tensors if record not in wanted)
    monkeypatch.setattr(prefetch, "DEFAULTS", replace(DEFAULTS, prefetch_wait_seconds=2.0))
    shared = BlockCache.create(source.size, source.version, 2)
    ranks = [PrefetchedSource(source, shared.reopen(), n, LoadProgress()) for n in range(2)]
    found: list[str] = []

    def load(mine: PrefetchedSource) -> None:
        with ReferenceStream(
            mine,
            index,
            wanted,
            key=sealed,
            options=LoadOptions(headers_sha256=digest_of_headers(path), left_out=left_out),
            progress=LoadProgress(),
        ) as stream:
            found.extend(record.name for record, _ in stream)
        mine.close()

    with fetching(source, shared, 0):
        threads = [threading.Thread(target=load, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == 2 * [wanted[0].name]
    assert not any(rank._given_up for rank in ranks)
