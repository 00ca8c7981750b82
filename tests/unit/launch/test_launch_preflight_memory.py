"""Whether weights and their load fit into memory, on machines that a test does not run on."""

from __future__ import annotations

from typing import Any

import pytest

from tensorserve.config.launch_plan import make_plan
from tensorserve.config.ranks import Ranks
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError
from tensorserve.launch.context import Shard
from tensorserve.launch.preflight import Weights, check_host_memory, check_memory, memory

GIB = 1024**3
FUSED = {"largest_bytes": 20 * GIB}


def test_too_little_memory_is_said_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """F11: what is needed and what there is."""
    monkeypatch.setattr(memory, "engine_is_cpu", lambda: True)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2_000_000_000)
    with pytest.raises(ConfigurationError, match=r"3\.00 GB, host memory has 2\.00 GB"):
        check_memory(3_000_000_000)
    assert "1.00 GB of 2.00 GB" in check_memory(1_000_000_000).found


@pytest.mark.parametrize(
    ("environ", "shard", "cpu", "expected"),
    [
        ({}, "s3://bucket/m", False, "5.37 GB for 1 rank(s), automatic: 80.00 GB available"),
        ({}, "/m", False, "1.07 GB for 1 rank(s), automatic: 80.00 GB available"),
        ({"TENSORSERVE_PREFETCH": "off"}, "s3://bucket/m", False, "1.07 GB for 1 rank(s)"),
        ({}, "/m", True, "0.50 GB for 1 rank(s)"),
        ({"TENSORSERVE_HOST_MEMORY_LIMIT": "2GB"}, "/m", True, "2.00 GB, as TENSORSERVE_HOST"),
    ],
    ids=["from a network", "from a disk", "nothing ahead", "weights stay", "the user's"],
)
def test_the_memory_for_the_load_is_said_and_handed_on(
    environ: dict[str, str],
    shard: str,
    cpu: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU the weights, 79 GB of them, are taken off what is available."""
    monkeypatch.setattr(memory, "engine_is_cpu", lambda: cpu)
    monkeypatch.setattr(memory, "available_bytes", lambda: 80 * 10**9)
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m", **environ})
    weights = Weights((Shard(shard, "1", 10),), 79 * 10**9)
    limit, passed = check_host_memory(settings, make_plan(settings), weights)
    assert passed.found.startswith(expected)
    assert f"{limit / 1e9:.2f} GB" in passed.found


@pytest.mark.parametrize(
    ("setting", "ranks", "said"),
    [("on", "2", True), ("on", "1", False), ("auto", "2", False), ("off", "2", False)],
)
def test_ranks_that_are_to_share_a_load_are_said(setting: str, ranks: str, said: bool) -> None:
    """`tensorserve check` shows it; whether they do is decided when they load."""
    environ = {
        "TENSORSERVE_MODEL_URI": "/m",
        "TENSORSERVE_SHARE_LOAD": setting,
        "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": ranks,
    }
    settings = Settings.from_environment(environ)
    weights = Weights((Shard("/m", "1", 10),), 10**6)
    _, passed = check_host_memory(settings, make_plan(settings), weights)
    assert passed.found.endswith("2 ranks open a part of the file each") == said


@pytest.mark.parametrize(
    ("environ", "found", "digests", "refused"),
    [
        ({"TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": "8"}, FUSED, False, "take its slice"),
        ({"TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": "2"}, FUSED, False, None),
        ({"TENSORSERVE_VLLM_DATA_PARALLEL_SIZE": "8"}, FUSED, False, None),
        (
            {
                "TENSORSERVE_VLLM_DATA_PARALLEL_SIZE": "8",
                "TENSORSERVE_VLLM_ENABLE_EXPERT_PARALLEL": "true",
            },
            FUSED,
            False,
            "take its slice",
        ),
        ({"TENSORSERVE_VLLM_DATA_PARALLEL_SIZE": "8"}, FUSED, True, "compare its digest"),
        (
            {"TENSORSERVE_VLLM_DATA_PARALLEL_SIZE": "8", "TENSORSERVE_LOADER": "reference"},
            FUSED,
            False,
            "LOADER=reference",
        ),
        ({"TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": "8"}, FUSED | {"sliced": False}, False, None),
        (
            {
                "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": "8",
                "TENSORSERVE_HOST_MEMORY_LIMIT": "1GiB",
            },
            FUSED,
            False,
            "take its slice",
        ),
    ],
)
def test_tensors_that_each_rank_holds_whole_fit_into_memory(
    environ: dict[str, str],
    found: dict[str, Any],
    digests: bool,
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Llama 4 Maverick's experts of a layer: eight ranks take 172 GB of a host with 100."""
    monkeypatch.setattr(memory, "engine_is_cpu", lambda: False)
    monkeypatch.setattr(memory, "available_bytes", lambda: 100 * 10**9)
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m", **environ})
    shard = Shard("/m", "1", 10, check_digests=digests)
    weights = Weights((shard,), 800 * 10**9, **found)
    if refused is None:
        assert check_host_memory(settings, make_plan(settings), weights)[0] > 0
        return
    with pytest.raises(ConfigurationError, match=refused) as raised:
        check_host_memory(settings, make_plan(settings), weights)
    assert raised.value.exit_code == 78
    assert "21.47 GB" in raised.value.message
    assert "8 rank(s)" in raised.value.message
    assert "100.00 GB" in raised.value.message


def test_each_machine_holds_its_part_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model beyond one machine is not refused on each of several."""
    monkeypatch.setattr(memory, "engine_is_cpu", lambda: True)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    with pytest.raises(ConfigurationError, match=r"1\.80 GB"):
        check_memory(1_800_000_000)
    said = check_memory(1_800_000_000, Ranks(2, 1, 2)).found
    assert "0.90 GB of 1.00 GB" in said
    by_ray = Ranks(2, None, 2)
    assert check_memory(1_800_000_000, by_ray).found == said


def test_each_replica_holds_the_weights_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two data-parallel engines on one machine need them twice."""
    monkeypatch.setattr(memory, "engine_is_cpu", lambda: True)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    with pytest.raises(ConfigurationError, match=r"weights of 2 ranks are 1\.20 GB"):
        check_memory(600_000_000, Ranks(1, 2))
