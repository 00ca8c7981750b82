"""When weights are fetched ahead, and when each rank is left to itself."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rangeserver import RangeServer
from tensorserve.config.access import access_for
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.launch import prefetch_process
from tensorserve.launch.context import Shard
from tensorserve.launch.prefetch_process import fetch_for_ranks, start_prefetch
from tensorserve.loading import LoadProgress
from tensorserve.loading.block_cache import BLOCK_BYTES, BlockCache
from tensorserve.loading.prefetch import PrefetchedSource
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Source, open_source
from tensorserve.telemetry import EventLog
from waiting import wait_for

S3 = Shard("s3://bucket/model/model.tensors", '"etag"', 10_000_000)


@pytest.mark.parametrize(
    ("environ", "arguments", "shards"),
    [
        pytest.param({"TENSORSERVE_PREFETCH": "off"}, (), (S3,), id="switched off"),
        pytest.param({}, (), (Shard("/models/model.tensors", "1", 10),), id="a local file"),
        pytest.param({}, (), (S3, S3), id="each rank its own file"),
        pytest.param({}, ("--pipeline-parallel-size", "2"), (S3,), id="pipeline ranks"),
        pytest.param({}, ("-pp=2",), (S3,), id="pipeline ranks, in short"),
        pytest.param({"TENSORSERVE_VLLM_DATA_PARALLEL_SIZE": "2"}, (), (S3,), id="data ranks"),
        pytest.param({"TENSORSERVE_VLLM_NNODES": "2"}, (), (S3,), id="several machines"),
    ],
)
def test_nothing_is_fetched_ahead(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    arguments: tuple[str, ...],
    shards: tuple[Shard, ...],
) -> None:
    """Where it would not help, or nobody knows when all readers are past a byte."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was started"))
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "s3://bucket/model", **environ})
    plan = make_plan(settings, arguments)
    assert start_prefetch(settings, plan, shards, EventLog(tmp_path / "log")) is None


def test_ranks_that_were_not_fetched_ahead_for_share_one_fetch(tmp_path: Path) -> None:
    """Two ranks read all of a file at their own pace; over the network each byte comes once."""
    data = os.urandom(5 * BLOCK_BYTES + 1234)
    (tmp_path / "model.tensors").write_bytes(data)
    with RangeServer(tmp_path) as server:
        uri = f"{server.url}/model.tensors"
        settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": uri})
        sources = [open_source(uri, access_for(settings), LoadProgress()) for _ in range(2)]
        path = fetch_for_ranks(
            settings,
            Shard(uri, sources[0].version, len(data)),
            2,
            budget=2 * BLOCK_BYTES,
            processors=os.sched_getaffinity(0),
            log=None,
        )
        with ThreadPoolExecutor(2) as ranks:
            read = [ranks.submit(_read, source, path, n) for n, source in enumerate(sources)]
        assert all(future.result() == data for future in read)
        ranges = [headers["Range"] for _, headers in server.requests if "Range" in headers]
    asked = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in ranges]
    # Whoever opens it looks at its beginning first.
    weights = [(start, end) for start, end in asked if (start, end) != asked[0]]
    assert sum(end + 1 - start for start, end in weights) == len(data)


def test_where_the_shared_fetch_fails_a_rank_reads_for_itself(tmp_path: Path) -> None:
    """The object is gone when the fetcher comes; a rank that has it open still reads."""
    data = os.urandom(2 * BLOCK_BYTES)
    (tmp_path / "model.tensors").write_bytes(data)
    with RangeServer(tmp_path) as server:
        uri = f"{server.url}/model.tensors"
        settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": uri})
        source = open_source(uri, access_for(settings), LoadProgress())
        path = fetch_for_ranks(
            settings,
            Shard(f"{server.url}/missing", source.version, len(data)),
            2,
            budget=2 * BLOCK_BYTES,
            processors=os.sched_getaffinity(0),
            log=None,
        )
        assert _read(source, path, 0) == data


def test_what_is_reported_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is there, and nobody asks for it yet: the log does not grow."""
    often = replace(DEFAULTS, prefetch_report_seconds=0.0)
    monkeypatch.setattr(prefetch_process, "DEFAULTS", often)
    looks: list[int] = []
    snapshot = LoadProgress.snapshot
    monkeypatch.setattr(
        LoadProgress, "snapshot", lambda progress: (looks.append(1), snapshot(progress))[1]
    )
    data = os.urandom(BLOCK_BYTES)
    (tmp_path / "model.tensors").write_bytes(data)
    log = tmp_path / "log"
    with RangeServer(tmp_path) as server:
        uri = f"{server.url}/model.tensors"
        settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": uri})
        source = open_source(uri, access_for(settings), LoadProgress())
        path = fetch_for_ranks(
            settings,
            Shard(uri, source.version, len(data)),
            1,
            budget=BLOCK_BYTES,
            processors=os.sched_getaffinity(0),
            log=EventLog(log),
        )
        wait_for(lambda: any(e["bytes"] >= len(data) for e in _prefetched(log)), 60)
        before = len(looks)
        wait_for(lambda: len(looks) > before + 3, 60)
        _read(source, path, 0)
    events = _prefetched(log)
    assert len(events) == len({json.dumps(event, sort_keys=True) for event in events})


def _prefetched(log: Path) -> list[dict[str, Any]]:
    """The events, without when they were."""
    lines = log.read_text().splitlines() if log.exists() else []
    events = [json.loads(line) for line in lines]
    kept = ("bytes", "requests", "retries")
    return [{name: event[name] for name in kept} for event in events]


def _read(source: Source, path: str, rank: int) -> bytes:
    shared = BlockCache(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    assert shared.fits(source)
    prefetched = PrefetchedSource(source, shared, rank, LoadProgress())
    found = bytearray(source.size)
    for offset in range(0, source.size, BLOCK_BYTES // 2):
        part = memoryview(found)[offset : offset + BLOCK_BYTES // 2]
        prefetched.read_into(offset, part)
        prefetched.passed(offset + len(part))
        time.sleep(0.01 * rank)
    prefetched.close()
    return bytes(found)
