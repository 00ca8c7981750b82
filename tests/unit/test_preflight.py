"""The checks before a start, those that an end-to-end test cannot show on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensorserve import preflight
from tensorserve.errors import ConfigurationError
from tensorserve.plan import make_plan
from tensorserve.ranks import Ranks
from tensorserve.settings import Settings
from tensorserve.start import Shard


def test_too_little_memory_is_said_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """F11: what is needed and what there is."""
    monkeypatch.setattr(preflight, "engine_is_cpu", lambda: True)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 2_000_000_000)
    with pytest.raises(ConfigurationError, match=r"3\.00 GB, host memory has 2\.00 GB"):
        preflight.check_memory(3_000_000_000)
    assert "1.00 GB of 2.00 GB" in preflight.check_memory(1_000_000_000).found


def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader knows vLLM's internals: it is made for one version."""
    monkeypatch.setattr(preflight, "_vllm_version", lambda: "0.33.0+cpu")
    with pytest.raises(ConfigurationError, match=r"0\.33\.0\+cpu is installed"):
        preflight.check_vllm()


def test_a_state_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """In a shared /tmp somebody else could have made it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="is a link"):
        preflight.prepare_state_dir(tmp_path / "state")


def test_a_state_directory_is_made_private(tmp_path: Path) -> None:
    """0700, also where it existed with more."""
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    preflight.prepare_state_dir(state)
    assert state.stat().st_mode & 0o777 == 0o700


def test_a_state_directory_below_a_file_says_what_to_do(tmp_path: Path) -> None:
    """F10."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="TENSORSERVE_STATE_DIR"):
        preflight.prepare_state_dir(tmp_path / "file" / "state")


def test_an_address_that_is_not_ours_is_said_as_such() -> None:
    """Not "in use": there is no such address here."""
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1"):
        preflight.check_port("API", "192.0.2.1", 8000)


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "\udcff"])
def test_what_is_no_host_name_is_said(host: str) -> None:
    """Not Python's UnicodeError."""
    with pytest.raises(ConfigurationError, match="cannot listen"):
        preflight.check_port("API", host, 8000)


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
    monkeypatch.setattr(preflight, "engine_is_cpu", lambda: cpu)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 80 * 10**9)
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m", **environ})
    weights = preflight.Weights((Shard(shard, "1", 10),), 79 * 10**9)
    found = preflight.check_host_memory(settings, make_plan(settings), weights).found
    assert found.startswith(expected)
    assert f"{(weights.host_memory_limit or 0) / 1e9:.2f} GB" in found


GIB = 1024**3
FUSED = {"largest_bytes": 20 * GIB}


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
def test_tensors_that_each_rank_holds_as_a_whole_fit_into_host_memory(
    environ: dict[str, str],
    found: dict[str, Any],
    digests: bool,
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Llama 4 Maverick's experts of a layer: eight ranks take 172 GB of a host with 100."""
    monkeypatch.setattr(preflight, "engine_is_cpu", lambda: False)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 100 * 10**9)
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m", **environ})
    shard = Shard("/m", "1", 10, check_digests=digests)
    weights = preflight.Weights((shard,), 800 * 10**9, **found)
    if refused is None:
        assert preflight.check_host_memory(settings, make_plan(settings), weights)
        return
    with pytest.raises(ConfigurationError, match=refused) as raised:
        preflight.check_host_memory(settings, make_plan(settings), weights)
    assert raised.value.exit_code == 78
    assert "21.47 GB" in raised.value.message
    assert "8 rank(s)" in raised.value.message
    assert "100.00 GB" in raised.value.message


def test_each_machine_holds_its_part_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model beyond one machine is not refused on each of several."""
    monkeypatch.setattr(preflight, "engine_is_cpu", lambda: True)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 10**9)
    with pytest.raises(ConfigurationError, match=r"1\.80 GB"):
        preflight.check_memory(1_800_000_000)
    said = preflight.check_memory(1_800_000_000, Ranks(2, 1, 2)).found
    assert "0.90 GB of 1.00 GB" in said
    by_ray = Ranks(2, None, 2)
    assert preflight.check_memory(1_800_000_000, by_ray).found == said


def test_each_replica_holds_the_weights_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two data-parallel engines on one machine need them twice."""
    monkeypatch.setattr(preflight, "engine_is_cpu", lambda: True)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 10**9)
    with pytest.raises(ConfigurationError, match=r"weights of 2 ranks are 1\.20 GB"):
        preflight.check_memory(600_000_000, Ranks(1, 2))
