"""How much host memory a load takes where nobody has said it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.launch import memory_budget
from tensorserve.launch.context import Start, publish_start, receive_start
from tensorserve.launch.memory_budget import automatic_limit, fetched_bytes, prefetch_budget
from tensorserve.loading.block_cache import BLOCK_BYTES
from tensorserve.loading.gpu_staging import RING_BYTES
from tensorserve.loading.tuning import DEFAULTS

MIB = 1024**2
GIB = 1024**3


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_each_rank_gets_a_ring_and_the_link_its_connections(ranks: int) -> None:
    """On a host made for GPUs: 100 Gbit/s take 140 connections at S3's 90 MB/s for each."""
    limit = automatic_limit(64 * ranks * GIB, ranks, fetches=True)
    fetched = fetched_bytes(limit, ranks)
    assert fetched // BLOCK_BYTES >= 140
    rank = (limit - fetched) // ranks
    assert rank // 2 >= RING_BYTES
    assert rank - RING_BYTES >= 64 * 6 * MIB


def test_eight_ranks_with_little_memory_still_have_a_whole_ring() -> None:
    """Half a GiB for each of them, where that is no more than half of what there is."""
    limit = automatic_limit(12 * GIB, 8, fetches=True)
    assert limit == 4 * GIB
    assert (limit - fetched_bytes(limit, 8)) // 8 // 2 >= RING_BYTES


@pytest.mark.parametrize(
    ("available", "held", "expected"),
    [
        (2_000_000_000, 300_000_000, 512 * MIB),  # a container of 2 GB: no more than half
        (900_000_000, 300_000_000, 300_000_000),
        (200_000_000, 180_000_000, 64 * MIB),  # what reads a model at all
        (10**12, 0, GIB),  # no more than is of use
        (None, 0, GIB),
    ],
)
def test_one_rank_that_fetches_nothing_ahead(
    available: int | None, held: int, expected: int
) -> None:
    """Weights that will stay in host memory are taken off first."""
    assert automatic_limit(available, 1, held=held) == expected


@pytest.mark.parametrize(("limit", "expected"), [(GIB, 384 * MIB), (9 * GIB, 8 * GIB)])
def test_what_a_rank_makes_no_use_of_is_fetched_ahead(limit: int, expected: int) -> None:
    """Three eighths are at least."""
    assert fetched_bytes(limit, 1) == expected
    assert expected >= DEFAULTS.job_bytes


def test_what_the_user_says_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is available."""
    monkeypatch.setattr(memory_budget, "available_bytes", lambda: 10**12)
    environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_HOST_MEMORY_LIMIT": "256MiB"}
    settings = Settings.from_environment(environ)
    assert memory_budget.limit_of(settings) == 256 * MIB
    assert prefetch_budget(settings, 1) == 96 * MIB


def test_all_processes_of_a_start_have_the_same_limit() -> None:
    """It is worked out once: when the ranks look, vLLM has taken some of what there was."""
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m"})
    plan = make_plan(settings)
    found = receive_start(publish_start(Start(settings, plan)))
    assert found.settings.host_memory_limit is None
    settings = replace(settings, host_memory_limit=123 * MIB)
    found = receive_start(publish_start(Start(settings, plan)))
    assert found.settings.host_memory_limit == 123 * MIB
