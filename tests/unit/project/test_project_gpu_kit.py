"""The GPU kit holds what it needs, and on the other machine it writes down what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit without wheels, which would have to be downloaded: here all packages are installed."""
    folder = tmp_path_factory.mktemp("kit") / "kit"
    done = program(ROOT / "bench" / "gpu-kit", str(folder), "--no-wheels")
    assert done.returncode == 0, done.stderr
    return folder


def program(*words: str | Path, compiler: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"CC": compiler} if compiler else {})
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=environment
    )


def test_our_c_is_in_it_compiled_and_as_source(kit: Path) -> None:
    """For machines with a compiler and without; what was compiled here is not among the sources."""
    assert sorted(file.name for file in (kit / "prebuilt").iterdir()) == [
        "_fetch.so",
        "_secretbox.so",
        "_span_table.so",
    ]
    assert list((kit / "entrypoint").rglob("*.c"))
    assert not list((kit / "entrypoint").rglob("*.so"))
    assert (kit / "lib" / "libsodium.so.23").is_file()


def test_tests_run_from_it(kit: Path, tmp_path: Path) -> None:
    """With its own copy of the sources; outcomes, the device and the commit stand in the result."""
    chosen = "tests/gpu/test_gpu_staging.py"
    words = ["tests", "--device", "cpu", "--output", str(tmp_path), "--", chosen, "-k", "slots"]
    done = program(kit / "run", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = (json.loads(file.read_text()) for file in tmp_path.glob("gpu-tests-*.json"))
    assert result["complete"]
    assert result["counts"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert list(result["tests"]) == [f"{chosen}::test_slots_are_page_locked"]
    assert result["machine"]["gpu"]["name"].startswith("the CPU")
    assert result["kit"] == result["versions"]["commit"] == (kit / "COMMIT").read_text().strip()
    assert set(result["built"]) == {"fetch", "secretbox", "span_table"}
    assert list(tmp_path.glob("gpu-tests-*.log"))


def test_a_failed_test_is_a_failed_run(kit: Path, tmp_path: Path) -> None:
    """Its words stand in the result. Where the compiler fails, the kit brings our C along."""
    broken = tmp_path / "test_broken.py"
    broken.write_text("def test_broken():\n    assert 1 == 2, 'as it should'\n")
    words = ["tests", "--device", "cpu", "--output", tmp_path / "out", "--", broken]
    done = program(kit / "run", *words, compiler="false")
    assert done.returncode == 1
    (result,) = (json.loads(file.read_text()) for file in tmp_path.glob("out/gpu-tests-*.json"))
    assert result["counts"] == {"passed": 0, "failed": 1, "skipped": 0}
    assert "as it should" in next(iter(result["tests"].values()))["said"]
    assert result["built"] == dict.fromkeys(
        ("fetch", "secretbox", "span_table"), "brought along; false said: "
    )


def test_without_a_gpu_nothing_is_run(kit: Path, tmp_path: Path) -> None:
    """It says what is missing, and how the kit itself is tried."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = program(kit / "run", "bench", "--output", tmp_path, compiler="false")
    assert done.returncode == 69
    assert "sees no GPU" in done.stderr
    assert "--device cpu" in done.stderr
