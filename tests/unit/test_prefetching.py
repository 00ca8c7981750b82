"""When weights are fetched ahead, and when each rank is left to itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tensorserve.plan import make_plan
from tensorserve.prefetching import start_prefetch
from tensorserve.settings import Settings
from tensorserve.start import Shard
from tensorserve.telemetry import EventLog

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
