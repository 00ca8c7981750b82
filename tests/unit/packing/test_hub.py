"""SRC as a name of the hub: from a cache laid out as huggingface_hub lays it out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hf_samples import make_model

from tensorserve.errors import ConfigurationError
from tensorserve.hub import model_directory
from tensorserve.manifest import read_manifest
from tensorserve.sources import Access

REVISION = "a" * 40


def cached(home: Path) -> Path:
    """A model `tests/tiny` in a hub cache."""
    repository = home / "hub" / "models--tests--tiny"
    make_model(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return home


def test_a_model_of_the_cache_is_packed_by_its_name(tmp_path: Path) -> None:
    """`pack organisation/model`, without a network; the suffix takes the model's name."""
    home = cached(tmp_path / "home")
    words = ["pack", "tests/tiny", str(tmp_path / "out"), "--suffix", "v1"]
    run = subprocess.run(
        [sys.executable, "-m", "tensorserve.cli", *words],
        env={"PATH": "", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert read_manifest(str(tmp_path / "out" / "vllm" / "tiny" / "v1"), Access()) is not None


def test_a_name_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    """Offline: says what was tried, with exit code 78."""
    run = subprocess.run(
        [sys.executable, "-m", "tensorserve.cli", "pack", "tests/none", str(tmp_path / "out")],
        env={"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == ConfigurationError.exit_code, run.stderr
    assert "is not in the hub's cache" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it looks like a name of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "model").mkdir(parents=True)
    assert model_directory(Path("my/model")) == (Path("my/model"), "model")
    assert model_directory(Path("./missing")) == (Path("./missing"), tmp_path.name)
