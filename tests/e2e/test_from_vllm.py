"""The blocks of docs/from-vllm-tensorizer.md, as they stand there, one after the other.

Added are only flags that make vLLM's CPU build start fast, and a free port.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import BIN, CPU_ENVIRONMENT, Running, Tensorserve, clean_environment, forking
from s3server import S3Server, free_ports
from test_readme import block_with, blocks

from lora_adapter import make_adapter

PAGE = "docs/from-vllm-tensorizer.md"
PROMPT = ["The capital of France is"]
FAST = ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, s3: S3Server) -> Path:
    """A directory in which the page's names exist, and all that its `pack` blocks make."""
    directory = tmp_path_factory.mktemp("page")
    s3.make_bucket("my-bucket")
    (directory / "my-model").symlink_to(model_dir)
    make_adapter(directory / "sql-adapter", model_dir)
    for block in blocks(PAGE):
        if block.startswith("tensorserve pack"):
            subprocess.run(
                ["bash", "-euc", block],
                cwd=directory,
                env=clean_environment() | s3.environment,
                check=True,
                capture_output=True,
            )
    return directory


def test_the_pack_blocks_make_bundles(place: Path, s3: S3Server) -> None:
    """Three, which `verify` likes."""
    environ = clean_environment() | s3.environment
    for uri, key in {
        "s3://my-bucket/vllm/my-model/v1": True,
        "s3://my-bucket/vllm/my-model/v1-sql": True,
        "./bundle": False,
    }.items():
        run = subprocess.run(
            [str(BIN / "tensorserve"), "verify", uri],
            cwd=place,
            env=environ | ({"TENSORSERVE_KEY_FILE": "model.key"} if key else {}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert ("adapters/sql/" in run.stdout) == uri.endswith("sql")
    config = json.loads((place / "bundle" / "config.json").read_text())
    assert "bfloat16" in {config.get("dtype"), config.get("torch_dtype")}


def test_the_serve_block(tmp_path: Path, place: Path, s3: S3Server) -> None:
    """The model and its adapter answer, each in its own way."""
    block = block_with(PAGE, "tensorserve up")
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", block, re.MULTILINE))
    exported["TENSORSERVE_KEY_FILE"] = str(place / exported["TENSORSERVE_KEY_FILE"])
    with Tensorserve(tmp_path, s3.environment | exported) as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPT) != engine.completions("sql", PROMPT)


def test_the_python_block(place: Path, s3: S3Server) -> None:
    """Two lines: with and without the adapter."""
    script = block_with(PAGE, "from vllm import LLM")
    script = script.replace("enable_lora=True,", "enable_lora=True, enforce_eager=True,")
    (place / "example.py").write_text(script)
    run = subprocess.run(
        [sys.executable, "example.py"],
        cwd=place,
        env=clean_environment() | CPU_ENVIRONMENT | s3.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert " Paris" in run.stdout


def test_the_vllm_serve_block(tmp_path: Path, place: Path, s3: S3Server) -> None:
    """vLLM's own command with its own options, from the bucket."""
    (port,) = free_ports(1)
    block = block_with(PAGE, "vllm serve ./my-model").rstrip()
    flags = " ".join([*FAST, "--host", "127.0.0.1", "--port", str(port)])
    engine = Running(
        ["bash", "-euc", f"cd {place}; exec {block} {flags} --served-model-name model"],
        # The Python block spawns, as at a user's.
        clean_environment() | CPU_ENVIRONMENT | forking() | s3.environment,
        tmp_path / "vllm.log",
        port,
    )
    with engine:
        engine.wait_ready()
        ((text, _),) = engine.completions("model", PROMPT)
        assert "Paris" in text


def test_every_block_is_one_of_these() -> None:
    """A new block needs a test."""
    kinds = ("tensorserve pack", "export TENSORSERVE_MODEL_URI", "from vllm import", "vllm serve")
    assert [block for block in blocks(PAGE) if not block.startswith(kinds)] == []
