"""What a rank of several takes for its load inside vLLM: its share of memory, its processors."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest
import torch
from vllm.config.load import LoadConfig

import fake_cuda
from tensorserve import vllm_loader
from tensorserve.errors import CorruptError
from tensorserve.format import FileIndex
from tensorserve.loading.staging import RING_BYTES
from tensorserve.opening import OpenTensors
from tensorserve.settings import Settings
from tensorserve.sources import Source
from tensorserve.start import Shard, Start
from tensorserve.vllm_loader import TensorserveLoader

MIB = 1024**2
GIB = 1024**3


def loader(limit: str, *, ranks: int, shares: bool) -> TensorserveLoader:
    """Of a rank on the second GPU; the container may use four processors."""
    environ = {"TENSORSERVE_MODEL_URI": "s3://b/m", "TENSORSERVE_HOST_MEMORY_LIMIT": limit}
    named = {"tensorizer_uri": "s3://b/m/model.tensors"}
    made = TensorserveLoader(LoadConfig(model_loader_extra_config=named))
    made._started = Start(Settings.from_environment(environ), (), (), frozenset(range(4)))
    made._ranks_here, made._shares = ranks, shares
    made._device = torch.device("cuda", 1)
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
    assert loader(limit, ranks=ranks, shares=shares)._memory_limit() == expected


@pytest.mark.parametrize(("limit", "ring"), [("12GiB", RING_BYTES), ("1GiB", RING_BYTES // 4)])
def test_a_ring_takes_no_more_than_half_of_a_ranks_share(
    limit: str, ring: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes or none: all tensors go through it."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(vllm_loader, "near", lambda *_: frozenset({2}))
    staging = loader(limit, ranks=8, shares=True)._staging()
    assert staging is not None
    assert staging.ring_bytes == ring


def test_threads_run_near_the_gpu_or_where_vllm_was_told_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's --numa-bind has bound the worker: its choice stands."""
    monkeypatch.setattr(vllm_loader, "near", lambda *_: frozenset({2}))
    made = loader("1GiB", ranks=1, shares=False)
    assert made._processors() == {2}
    made._numa_bound = True
    assert made._processors() == os.sched_getaffinity(0)
    made._device = torch.device("cpu")
    assert made._processors() == set(range(4))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_is_hidden_where_no_other_rank_is_on_the_machine(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipeline stages and replicas of tensor-parallel size 1 hand memory on as well."""
    hidden: list[bool] = []
    monkeypatch.setattr(vllm_loader, "hide_memory", lambda: hidden.append(True))
    loader("1GiB", ranks=ranks, shares=False)._hide_memory()
    assert bool(hidden) == (ranks == 1)


@pytest.mark.parametrize("broken", ["checked_as", "TensorStream", "report_every"])
def test_a_load_that_does_not_begin_leaves_no_page_locked_memory(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring is made after the checks, and given back whatever raises then."""
    cuda = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(vllm_loader, "near", lambda *_: frozenset({2}))
    monkeypatch.setattr(vllm_loader, "checked_as", lambda options, *_: options)

    def fails(*_: object, **__: object) -> NoReturn:
        raise CorruptError("broken")

    monkeypatch.setattr(vllm_loader, broken, fails)
    made = loader("1GiB", ranks=1, shares=False)
    source = SimpleNamespace(name="a test's")
    index = SimpleNamespace(encrypted=False)
    opened = OpenTensors(cast("Source", source), cast("FileIndex", index), None)
    made._started = replace(made._start, shards=(Shard("s3://b/m", None, 1),))
    with pytest.raises(CorruptError, match="broken"):
        next(made._stream(opened, []))
    gc.collect()
    assert not cuda.locked
