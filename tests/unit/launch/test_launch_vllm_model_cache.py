"""What an image knows of a model's class gets into vLLM's cache, or vLLM is left to look itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorserve.launch.vllm_model_cache import bring_model_infos

INFO = b'{"hash": "new"}'


@pytest.fixture
def brought(tmp_path: Path) -> Path:
    """What an image has: two architectures of one class, and a file of another."""
    directory = tmp_path / "brought"
    (directory / "modelinfos").mkdir(parents=True)
    (directory / "modelinfos" / "llama.json").write_bytes(INFO)
    (directory / "modelinfos" / "other.json").write_bytes(b"{}")
    files = {"LlamaForCausalLM": "llama.json", "XverseForCausalLM": "llama.json"}
    (directory / "architectures.json").write_text(json.dumps(files))
    return directory


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """With a config.json of Llama's."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"architectures": ["XverseForCausalLM"]}')
    return directory


def cached(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "modelinfos").iterdir()}


def test_a_new_cache_gets_the_model_s_own(brought: Path, model_dir: Path, tmp_path: Path) -> None:
    """By the architecture in config.json, under vLLM's own file name; nothing else."""
    root = tmp_path / "cache" / "vllm"
    bring_model_infos(model_dir, {"VLLM_CACHE_ROOT": str(root)}, brought)
    assert cached(root) == {"llama.json": INFO}


def test_what_another_version_left_is_replaced(
    brought: Path, model_dir: Path, tmp_path: Path
) -> None:
    """And what is the same already is not written again."""
    (tmp_path / "modelinfos").mkdir()
    held = tmp_path / "modelinfos" / "llama.json"
    held.write_bytes(b'{"hash": "old"}')
    bring_model_infos(model_dir, {"VLLM_CACHE_ROOT": str(tmp_path)}, brought)
    assert cached(tmp_path) == {"llama.json": INFO}
    before = held.stat()
    bring_model_infos(model_dir, {"VLLM_CACHE_ROOT": str(tmp_path)}, brought)
    assert (held.stat().st_ino, held.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    "config",
    [
        '{"architectures": ["Unknown"]}',
        '{"architectures": null}',
        '{"architectures": [[1]]}',
        "{}",
        "[]",
        "not JSON",
        None,
    ],
)
def test_what_is_not_known_is_left_to_vllm(
    config: str | None, brought: Path, model_dir: Path, tmp_path: Path
) -> None:
    """Whatever config.json says, and without one: no error, nothing in the cache."""
    if config is None:
        (model_dir / "config.json").unlink()
    else:
        (model_dir / "config.json").write_text(config)
    bring_model_infos(model_dir, {"VLLM_CACHE_ROOT": str(tmp_path)}, brought)
    assert not (tmp_path / "modelinfos").exists()


def test_a_cache_that_cannot_be_written_is_left_to_vllm(
    brought: Path, model_dir: Path, tmp_path: Path
) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "cache").write_bytes(b"")
    bring_model_infos(model_dir, {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}, brought)


def test_outside_of_an_image_nothing_is_done(model_dir: Path, tmp_path: Path) -> None:
    """No folder of ours, or no cache of the container's: vLLM keeps its own in the user's home."""
    bring_model_infos(model_dir, {"VLLM_CACHE_ROOT": str(tmp_path)}, tmp_path / "none")
    assert not (tmp_path / "modelinfos").exists()
