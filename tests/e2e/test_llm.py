"""vLLM from Python, and vLLM's own commands and options, with our loader behind them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
import tiny_models
import torch
from running import BIN, CPU_ENVIRONMENT, Running, clean_environment, stock_vllm
from s3server import S3Server

from rangeserver import RangeServer

PROMPTS = ["The capital of France is", "1 2 3 4"]
OFFLINE = Path(__file__).with_name("offline.py")


def answers(
    cases: list[dict[str, Any]], *, log_probabilities: bool = False, **environ: str
) -> list[list[str]]:
    """The texts of each case, all in one process; and each token's log-probability, to the last
    bit.
    """
    run = subprocess.run(
        [sys.executable, str(OFFLINE)],
        input=json.dumps(
            {"prompts": PROMPTS, "log_probabilities": log_probabilities, "cases": cases}
        ),
        env=clean_environment() | CPU_ENVIRONMENT | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: list[list[str]] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def pack(source: Path, destination: str, key_file: Path, **environ: str) -> None:
    """`tensorserve pack --encrypt`."""
    words = [str(BIN / "tensorserve"), "pack", str(source), destination, "--encrypt"]
    words += ["--key-file", str(key_file)]
    subprocess.run(words, env=clean_environment() | environ, check=True, capture_output=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, s3: S3Server) -> Path:
    """SmolLM2, encrypted, in <packed>/bundle and in s3://llm/smollm2; its key in <packed>/key."""
    base = tmp_path_factory.mktemp("packed")
    pack(model_dir, str(base / "bundle"), base / "key")
    s3.make_bucket("llm")
    pack(model_dir, "s3://llm/smollm2", base / "key", **s3.environment)
    return base


def test_llm_loads_from_disk_http_and_s3(
    tmp_path: Path, packed: Path, model_dir: Path, s3: S3Server
) -> None:
    """Two models in one process, from three places (S3: by both readers), and by vLLM's own
    options; each LLM has its own weights."""
    other = tiny_models.llama(tmp_path / "other", model_dir, torch.bfloat16, tied=False)
    pack(other, str(tmp_path / "tiny"), tmp_path / "tiny.key")
    by_options = {
        "model": str(model_dir),
        "load_format": "tensorizer",
        "model_loader_extra_config": {
            "tensorizer_uri": "s3://llm/smollm2/model.tensors",
            "encryption_keyfile": str(packed / "key"),
            "s3_endpoint": s3.endpoint_url,
            "s3_access_key_id": s3.access_key,
            "s3_secret_access_key": s3.secret_key,
            "deserialization_kwargs": {"num_readers": 2, "verify_hash": True},
        },
    }
    tiny_key = {"key_file": str(tmp_path / "tiny.key")}
    reference = {"key_file": str(packed / "key"), "loader": "reference"}
    with RangeServer(packed / "bundle") as server:
        smollm2, tiny, over_http, by_reference, with_options = answers(
            [
                {"uri": str(packed / "bundle"), "settings": {"key_file": str(packed / "key")}},
                {"uri": str(tmp_path / "tiny"), "settings": tiny_key},
                {"uri": server.url, "settings": {"key": (packed / "key").read_bytes().hex()}},
                {"uri": "s3://llm/smollm2", "settings": reference},
                {"llm": by_options},
            ],
            log_probabilities=True,
            **s3.environment,
        )
    stock_smollm2, stock_tiny = answers(
        [{"llm": {"model": str(model_dir)}}, {"llm": {"model": str(other)}}],
        log_probabilities=True,
    )
    assert len(stock_smollm2) == 2 * len(PROMPTS)
    assert smollm2 == over_http == by_reference == with_options == stock_smollm2
    assert tiny == stock_tiny != smollm2


def test_vllm_serve_takes_its_own_options(
    tmp_path: Path, packed: Path, model_dir: Path, s3: S3Server
) -> None:
    """`vllm serve DIR --load-format tensorizer`, encrypted; the key comes from S3."""
    with stock_vllm(tmp_path, model_dir) as stock:
        stock.wait_ready()
        wanted = stock.completions("model", PROMPTS)
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint_url,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name="us-east-1",
    )
    client.put_object(Bucket="llm", Key="the.key", Body=(packed / "key").read_bytes())
    engine = stock_vllm(tmp_path, packed / "bundle")
    engine.environment |= s3.environment
    engine.command += ["--load-format", "tensorizer", "--model-loader-extra-config"]
    engine.command += [json.dumps({"encryption_keyfile": "s3://llm/the.key"})]
    with engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == wanted


def test_a_wrong_option_ends_vllm_with_our_words(tmp_path: Path, packed: Path) -> None:
    """Not with half a model."""
    engine: Running = stock_vllm(tmp_path, packed / "bundle")
    engine.command += ["--load-format", "tensorizer", "--model-loader-extra-config"]
    engine.command += [json.dumps({"encryption_keyfil": str(packed / "key")})]
    with engine:
        assert engine.process is not None
        assert engine.process.wait(120) != 0
    assert "Did you mean 'encryption_keyfile'" in engine.text
