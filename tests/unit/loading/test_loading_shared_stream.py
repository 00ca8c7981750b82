"""Ranks that load one file together: real process groups (gloo) of two and four processes."""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorizer import EncryptionParams, TensorSerializer
from tests.waiting import wait_for

from tensorserve.bundle.keys import GivenKey
from tensorserve.errors import SourceUnavailableError, TensorserveError
from tensorserve.format import FileIndex, TensorRecord, read_index
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream, rank_group
from tensorserve.loading.agreement import agree, offer_of
from tensorserve.loading.rank_group import RankGroup
from tensorserve.loading.shared_stream import SharedStream
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Access, Filling, Source, open_source
from tensorserve.telemetry.names import Sharing

MIB = 1024**2
LARGEST = 5 * MIB  # message
KEY = bytes(range(32))


@dataclass(frozen=True)
class Case:
    """One load by all ranks."""

    file: str = "encrypted"
    limit: int = 64 * MIB
    digest: str | None = "right"
    """Of the headers, from the manifest: None, `right` or `wrong`."""
    own: Callable[[int, TensorRecord], bool] = lambda *_: True
    """Whether a rank loads a tensor."""
    spoilt: Callable[[int, Source], Source] = lambda _, source: source
    taken: Callable[[int, str], None] = lambda *_: None
    """What a rank's consumer does with a tensor."""
    device: str = "cpu"
    """`cuda`: with a second group for the tensors, as with NCCL; here it is gloo as well."""


class Wrapped(Source):
    """Another source, with some trouble."""

    def __init__(self, source: Source) -> None:
        self.name, self.size, self.version = source.name, source.size, source.version
        self.pinned, self.remote = source.pinned, source.remote
        self._source = source

    def read_parts(self, offset: int, parts: Filling) -> None:
        self._source.read_parts(offset, parts)

    def close(self) -> None:
        self._source.close()


class Away(Wrapped):
    """Fails for all but the first tensors."""

    def read_parts(self, offset: int, parts: Filling) -> None:
        if offset > self.size // 20:
            raise SourceUnavailableError("The server is away.")
        super().read_parts(offset, parts)


class Unpinned(Wrapped):
    """Every header is read a second time."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.pinned, self.version = False, None


class OtherVersion(Wrapped):
    """As after the file was replaced."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.version = "another"


class Exchanged(Unpinned):
    """The headers are others when they are read again."""

    def read_again(self, offset: int, buffer: memoryview) -> None:  # noqa: ARG002
        buffer[:] = bytes(len(buffer))


def of_rank_1(kind: Callable[[Source], Source]) -> Callable[[int, Source], Source]:
    return lambda rank, source: kind(source) if rank == 1 else source


def unpinned_and_exchanged(rank: int, source: Source) -> Source:
    return Exchanged(source) if rank == 1 else Unpinned(source)


def experts(rank: int, record: TensorRecord) -> bool:
    """Each rank has two layers of its own; one is no one's."""
    number = record.name.rpartition(".")[2]
    return number not in {"19"} and (int(number) % 5 != 0 or int(number) // 5 % 4 == rank)


def raising(rank: int, name: str) -> None:
    """As a weight loader that refuses a tensor."""
    if rank == 1 and name.endswith(".9"):
        raise ValueError("it does not fit")


def dying(rank: int, name: str) -> None:
    if rank == 1 and name.endswith(".9"):
        os.kill(os.getpid(), signal.SIGKILL)


CASES = {
    "encrypted": Case(),
    "plain": Case("plain"),
    "little_memory": Case(limit=1),
    "without_a_manifest": Case(digest=None),
    "unpinned": Case(digest=None, spoilt=lambda _, source: Unpinned(source)),
    "experts": Case(own=experts),
    "two_groups": Case(device="cuda"),
}
FAILURES = {
    "wrong_digest": Case(digest="wrong"),
    "damaged": Case("damaged"),
    "away": Case(spoilt=of_rank_1(Away)),
    "away_two_groups": Case(spoilt=of_rank_1(Away), device="cuda"),
    "replaced": Case(spoilt=of_rank_1(OtherVersion)),
    "exchanged": Case(digest=None, spoilt=unpinned_and_exchanged),
    "raising": Case(taken=raising),
    "dying": Case(taken=dying),
}


def tensors(file: str = "encrypted") -> dict[str, torch.Tensor]:
    """Of all sizes and dtypes that matter, with names in the file's order."""
    made = torch.Generator().manual_seed(1)
    found: list[torch.Tensor] = [
        torch.randn(700, 1024, generator=made).to(torch.bfloat16),
        torch.randint(0, 256, (3 * MIB + 17,), dtype=torch.uint8, generator=made),
        torch.randn(33, 5, generator=made).to(torch.float8_e4m3fn),
        torch.randn(7, generator=made).to(torch.complex64),
        torch.tensor(2.5),
        torch.randn(300, 999, generator=made) > 0,
        torch.randint(-9, 9, (11,), dtype=torch.int64, generator=made),
    ]
    sizes = (1, 1001, MIB, MIB + 1, 2 * MIB + 1, 5 * MIB, 4096, 77, 300_001, 900_000, 3, 2 * MIB)
    found += [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=made) for n in sizes]
    if file == "plain":  # tensorizer cannot seal it
        found.append(torch.empty(0, 5))
    return {f"layer.{number}": tensor for number, tensor in enumerate(found)}


def digest_of(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + content).hexdigest()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the samples."""
    folder = tmp_path_factory.mktemp("files")
    for name, encryption in (("plain", None), ("encrypted", EncryptionParams(key=KEY))):
        serializer = TensorSerializer(str(folder / name), encryption=encryption)
        serializer.write_state_dict(tensors(name))
        serializer.close()
    data = bytearray((folder / "encrypted").read_bytes())
    source = open_source(str(folder / "encrypted"), Access())
    record = next(r for r in read_index(source).tensors if r.name == "layer.13")
    data[record.data_offset + 7] ^= 1
    (folder / "damaged").write_bytes(data)
    return folder


class Lent:
    """Memory for messages, and how much of it there was at most at one time."""

    def __init__(self) -> None:
        self._live = self.peak = 0

    def give(self, count: int) -> torch.Tensor:
        owner = (ctypes.c_ubyte * count)()
        weakref.finalize(owner, self._back, count)
        self._live += count
        self.peak = max(self.peak, self._live)
        return torch.frombuffer(owner, dtype=torch.uint8, count=count)

    def _back(self, count: int) -> None:
        self._live -= count


# In the processes ---------------------------------------------------------------------------------


@contextmanager
def shared(
    case: Case, folder: str, rank: int, ranks: int, progress: LoadProgress, lent: Lent
) -> Iterator[tuple[SharedStream, FileIndex]]:
    """The stream of one rank, set up as engine/rank_stream.py does."""
    source = open_source(f"{folder}/{case.file}", Access(), progress)
    index = read_index(source)
    wanted = [record for record in index.tensors if case.own(rank, record)]
    headers = b"".join(source.read(r.header_offset, r.header_length) for r in index.tensors)
    source = case.spoilt(rank, source)
    digest = {
        None: None,
        "right": hashlib.sha256(headers).hexdigest(),
        "wrong": hashlib.sha256(b"x").hexdigest(),
    }[case.digest]

    def gather(offer: Any) -> list[Any]:
        found: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(found, offer)
        return found

    offer = offer_of(source, index, digest, wanted, most=None)
    agreement = agree(offer, index, rank, gather)
    assert agreement.sharing is Sharing.SHARED
    options = LoadOptions(
        connections=3,
        ahead_bytes=case.limit,
        headers_sha256=digest,
        left_out=agreement.left_out,
    )
    group = RankGroup(agreement.name, rank, ranks, torch.device(case.device))
    failed = True
    try:
        own = TensorStream(
            source,
            agreement.opened(wanted, rank),
            encrypted=index.encrypted,
            key=GivenKey(KEY, "test"),
            options=options,
            progress=progress,
            check_whole=False,
            paced=True,
        )
        window = case.limit // 4
        stream = SharedStream(
            own, agreement.messages, group, source, options, window=window, memory=lent.give
        )
        with stream:
            yield stream, index
        failed = False
    finally:
        group.close(failed=failed)
        source.close()


def loaded(case: Case, folder: str, rank: int, ranks: int) -> dict[str, Any]:
    """What a rank got, and what it fetched and opened."""
    progress, lent = LoadProgress(), Lent()
    found: list[tuple[str, str]] = []
    try:
        with shared(case, folder, rank, ranks, progress, lent) as (stream, _):
            for record, tensor in stream:
                case.taken(rank, record.name)
                found.append((record.name, digest_of(tensor)))
                tensor.zero_()  # as a consumer may
    except (TensorserveError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    counts = progress.snapshot()
    return {"found": found, "fetched": counts.fetch, "opened": counts.decrypt, "peak": lent.peak}


def run(rank: int, ranks: int, names: list[str], folder: str, said: str) -> None:
    """One rank: what each case gives goes into a file."""
    rank_group.DEFAULTS = replace(DEFAULTS, other_rank_seconds=0.0)  # type: ignore[attr-defined]
    rank_group._nccl = rank_group._gloo
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{said}/store", rank=rank, world_size=ranks
    )
    for name in names:
        case = (CASES | FAILURES)[name]
        found = loaded(case, folder, rank, ranks)
        Path(f"{said}/{name}-{rank}").write_text(json.dumps(found))
    os._exit(0)  # as a process that is ended: broadcasts may be on their way


def left_alone(rank: int, said: str) -> None:
    """Rank 0 kills rank 1 as soon as the first byte of its broadcast is there."""
    rank_group.DEFAULTS = replace(DEFAULTS, other_rank_seconds=0.0)  # type: ignore[attr-defined]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{said}/store", rank=rank, world_size=2
    )
    group = RankGroup("test", rank, 2, torch.device("cpu"))
    sender = group.gather(os.getpid())[1]
    memory = torch.zeros(1024 * MIB, dtype=torch.uint8)  # pages that nobody touches cost nothing
    memory[0] = rank
    word = group.say() if rank == 1 else group.hear(1)
    group.heard(word)
    broadcast = group.broadcast(memory, word)
    if rank == 1:
        group.arrived(broadcast)
        raise AssertionError("it was to be killed before that")
    while not memory[0]:
        pass
    os.kill(sender, signal.SIGKILL)
    with suppress(TensorserveError):
        group.arrived(broadcast)
    Path(f"{said}/ended").touch()
    os._exit(0)


def fork_server() -> ForkServerContext:
    """What makes the ranks' processes."""
    server = multiprocessing.get_context("forkserver")
    # Their imports (torch) once for all. Not this module: Python 3.11 does not find it there.
    server.set_forkserver_preload(["tensorizer", "tensorserve.loading.shared_stream"])
    return server


def results(
    names: list[str], files: Path, said: Path, ranks: int
) -> dict[str, list[dict[str, Any] | None]]:
    """For each case what each rank wrote; None where it ended before."""
    server = fork_server()
    processes = [
        server.Process(target=run, args=(rank, ranks, names, str(files), str(said)))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    hanging = [process.pid for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hanging
    every: dict[str, list[dict[str, Any] | None]] = {}
    for name in names:
        paths = [said / f"{name}-{rank}" for rank in range(ranks)]
        every[name] = [json.loads(p.read_text()) if p.exists() else None for p in paths]
    return every


# The tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_gets_all_and_opens_its_part(files: Path, tmp_path: Path, ranks: int) -> None:
    """Bit for bit and in file order; all ranks together open the file once."""
    size = sum(tensor.nbytes for tensor in tensors().values())
    for name, by_rank in results(list(CASES), files, tmp_path, ranks).items():
        opened, fetched = [], []
        for rank, found in enumerate(by_rank):
            assert found is not None, name
            assert "error" not in found, (name, found)
            case = CASES[name]
            wanted = tensors(case.file)
            mine = [
                (record.name, digest_of(wanted[record.name]))
                for record in records(files / case.file)
                if case.own(rank, record)
            ]
            assert [tuple(pair) for pair in found["found"]] == mine, name
            opened.append(found["opened"])
            fetched.append(found["fetched"])
        if name == "experts":
            continue
        assert sum(fetched) == size
        assert sum(opened) == (0 if name == "plain" else size)
        # No more than the window, or one message, and what the consumer has.
        window = CASES[name].limit // 4
        peak = max(found["peak"] for found in by_rank if found is not None)
        assert peak <= max(window, LARGEST) + LARGEST
        # No more than a tensor above its part.
        assert max(fetched) <= size / ranks + LARGEST


def records(file: Path) -> tuple[TensorRecord, ...]:
    return read_index(open_source(str(file), Access())).tensors


@pytest.mark.parametrize(
    ("name", "ranks"), [*((name, 2) for name in FAILURES), ("away", 4), ("dying", 4)]
)
def test_a_rank_that_fails_ends_all_with_its_error(
    files: Path, tmp_path: Path, name: str, ranks: int
) -> None:
    """F6, F8, F18: no rank waits for it, and none takes its own end for the cause."""
    (by_rank,) = results([name], files, tmp_path, ranks).values()
    errors = [None if found is None else found.get("error") for found in by_rank]
    kinds = [None if error is None else error.partition(":")[0] for error in errors]
    others = ["OtherRankError"] * (ranks - 2)
    if name in {"wrong_digest", "replaced"}:
        assert kinds == ["CorruptError"] * 2
    elif name == "damaged":  # whoever opens it
        assert sorted(map(str, kinds)) == ["OtherRankError", "TagMismatchError"]
        assert "layer.13" in str(errors)
    else:
        cause = {
            "away": "SourceUnavailableError", "away_two_groups": "SourceUnavailableError",
            "exchanged": "ReplacedError",
            "raising": "ValueError", "dying": None,
        }[name]  # fmt: skip
        assert kinds == ["OtherRankError", cause, *others]


def test_a_rank_that_ends_in_a_broadcast_is_noticed(tmp_path: Path) -> None:
    """gloo tells nobody who has received a part of the message already."""
    server = fork_server()
    processes = [server.Process(target=left_alone, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        wait_for((tmp_path / "ended").exists, 60)
    finally:
        for process in processes:
            process.kill()
