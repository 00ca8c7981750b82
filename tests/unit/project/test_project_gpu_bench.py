"""The benches of a GPU run where only torch, tensorizer and this package are; tried here on CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
# What the GPU kit does not bring, and the machine may lack.
ABSENT = "vllm cryptography blake3 transformers huggingface_hub supervisor pynvml s3server"
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (the test hides it)", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a machine without those packages, and without git."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(BLOCKER)
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(bare), "HOME": str(tmp_path)}


def run(module: str, tmp_path: Path, environment: dict[str, str], *words: str) -> dict[str, Any]:
    """The result of a bench of some 60 MB."""
    output = tmp_path / "result.json"
    common = ["--device", "cpu", "--size", "60MB", "--minutes", "3", "--repetitions", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", module, *common, "--directory", str(tmp_path)),
            *("--output", str(output), *words),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "tensorserve-bench").exists(), "the model was left in memory"
    return dict(json.loads(output.read_text()))


def test_what_is_hidden_cannot_be_imported(environment: dict[str, str]) -> None:
    """Else the tests below show nothing."""
    done = subprocess.run(
        [sys.executable, "-c", "import cryptography"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the test hides it" in done.stderr


def test_loads(tmp_path: Path, environment: dict[str, str]) -> None:
    """This loader and tensorizer, in a process each; device and versions stand in the result."""
    names = "ours-encrypted,tensorizer-encrypted"
    result = run("bench.gpu", tmp_path, environment, "--contestants", names)
    assert [line["name"] for line in result["lines"]] == names.split(",")
    assert all(len(line["samples"]) == 1 for line in result["lines"])
    assert result["failed"] == []
    assert result["machine"]["gpu"]["name"].startswith("the CPU")
    assert result["versions"]["commit"] == "unknown"
    assert result["versions"]["torch"]


def test_sweep(tmp_path: Path, environment: dict[str, str]) -> None:
    """A table of loads and a step, all in one process; others were not asked for."""
    result = run("bench.gpu_sweep", tmp_path, environment, "--tables", "nodes")
    assert result["failed"] == []
    assert result["left_out"] == []
    (table,) = result["tables"]
    assert len(table["rows"]) >= 2
    assert all(float(cell) > 0 for row in table["rows"][1:] for cell in row[2:])
