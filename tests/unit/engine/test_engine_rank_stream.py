"""What a rank of several takes for its load inside vLLM: its share of memory, its processors."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
import torch

import fake_cuda
from tensorserve.bundle.tensors_file import OpenTensors
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.engine import loader, rank_stream
from tensorserve.engine.rank_stream import Rank, RankStream
from tensorserve.errors import CorruptError
from tensorserve.format import FileIndex
from tensorserve.launch.context import Shard, Start
from tensorserve.loading.gpu_staging import RING_BYTES
from tensorserve.sources import Source

MIB = 1024**2
GIB = 1024**3
GPU = torch.device("cuda", 1)


def stream(limit: str, *, ranks: int, shares: bool, **of: Any) -> RankStream:
    """Of a rank on the second GPU; the container may use four processors."""
    environ = {"TENSORSERVE_MODEL_URI": "s3://b/m", "TENSORSERVE_HOST_MEMORY_LIMIT": limit}
    shard = Shard("s3://b/m", None, 1)
    settings = Settings.from_environment(environ)
    start = Start(settings, make_plan(settings), (shard,), frozenset(range(4)))
    made = RankStream(start, Rank(**{"device": GPU, "ranks_here": ranks, **of}))
    made._shares = shares
    return made


@pytest.mark.parametrize(
    ("limit", "ranks", "shares", "expected"),
    [
        ("1GiB", 1, False, GIB),
        ("1GiB", 8, True, 80 * MIB),
        ("12GiB", 8, True, 960 * MIB),
        ("5GiB", 1, True, GIB),
    ],
)
def test_ranks_share_what_is_not_for_what_is_fetched(
    limit: str, ranks: int, shares: bool, expected: int
) -> None:
    """Three eighths, or all beyond 1 GiB for each rank, are for what is fetched ahead."""
    assert stream(limit, ranks=ranks, shares=shares)._memory_limit() == expected


@pytest.mark.parametrize(("limit", "ring"), [("12GiB", RING_BYTES), ("1GiB", RING_BYTES // 4)])
def test_a_ring_takes_no_more_than_half_of_a_ranks_share(
    limit: str, ring: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes or none: all tensors go through it."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(rank_stream, "near", lambda *_: frozenset({2}))
    staging = stream(limit, ranks=8, shares=True)._staging()
    assert staging is not None
    assert staging.ring_bytes == ring


def test_threads_run_near_the_gpu_or_where_vllm_was_told_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's --numa-bind has bound the worker: its choice stands."""
    monkeypatch.setattr(rank_stream, "near", lambda *_: frozenset({2}))

    def processors(**of: Any) -> frozenset[int]:
        return stream("1GiB", ranks=1, shares=False, **of)._processors()

    assert processors() == {2}
    assert processors(numa_bound=True) == os.sched_getaffinity(0)
    assert processors(device=torch.device("cpu")) == set(range(4))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_is_hidden_where_it_is_alone_on_the_machine(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipeline stages and replicas of tensor-parallel size 1 hand memory on as well."""
    hidden: list[bool] = []
    monkeypatch.setattr(loader, "hide_memory", lambda: hidden.append(True))
    loader.hide_from_others(Rank(GPU, ranks_here=ranks))
    assert bool(hidden) == (ranks == 1)


@pytest.mark.parametrize("broken", ["checked_as", "TensorStream", "report_every"])
def test_a_load_that_does_not_begin_leaves_no_page_locked_memory(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring is made after the checks, and given back whatever raises then."""
    cuda = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(rank_stream, "near", lambda *_: frozenset({2}))
    monkeypatch.setattr(rank_stream, "checked_as", lambda options, *_: options)

    def fails(*_: object, **__: object) -> NoReturn:
        raise CorruptError("broken")

    monkeypatch.setattr(rank_stream, broken, fails)
    made = stream("1GiB", ranks=1, shares=False)
    source = SimpleNamespace(name="a test's")
    index = SimpleNamespace(encrypted=False)
    opened = OpenTensors(cast("Source", source), cast("FileIndex", index), None)
    with pytest.raises(CorruptError, match="broken"):
        next(made.tensors(opened, []))
    gc.collect()
    assert not cuda.locked
