"""vLLM from Python, and vLLM's own commands and options, with our loader behind them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from running import BIN, CPU_ENVIRONMENT, Running, clean_environment, forking, stock_vllm
from s3server import S3Server

from rangeserver import RangeServer
from s3_clients import s3_client

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
        env=clean_environment() | CPU_ENVIRONMENT | forking() | environ,
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
    tmp_path: Path,
    packed: Path,
    model_dir: Path,
    s3: S3Server,
    stock_answers: dict[str, tuple[str, list[float]]],
) -> None:
    """Two models in one process, from three places (S3: by both readers), one by vLLM's own
    options; each LLM has its own weights. Where the key goes by value, vLLM spawns its processes:
    nothing of what they need is inherited. With vLLM's options test_from_vllm.py spawns them."""
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
    by_value = {"key": (tmp_path / "tiny.key").read_bytes().hex()}
    reference = {"key_file": str(packed / "key"), "loader": "reference"}
    with RangeServer(tmp_path / "tiny") as server:
        stock_tiny, smollm2, over_http, by_reference, with_options = answers(
            [
                # First: nothing of ours has run in this process.
                {"llm": {"model": str(other)}},
                {"uri": str(packed / "bundle"), "settings": {"key_file": str(packed / "key")}},
                {"uri": server.url, "settings": by_value, "spawn": True},
                {"uri": "s3://llm/smollm2", "settings": reference},
                {"llm": by_options},
            ],
            log_probabilities=True,
            **s3.environment,
        )
    stock = [stock_answers[prompt] for prompt in PROMPTS]
    stock_smollm2 = [text for text, _ in stock] + [str(found) for _, found in stock]
    assert smollm2 == by_reference == with_options == stock_smollm2
    assert over_http == stock_tiny != smollm2


def test_vllm_serve_takes_its_own_options(
    tmp_path: Path,
    packed: Path,
    stock_answers: dict[str, tuple[str, list[float]]],
    s3: S3Server,
) -> None:
    """`vllm serve DIR --load-format tensorizer`, encrypted; the key comes from S3."""
    client = s3_client(s3)
    client.put_object(Bucket="llm", Key="the.key", Body=(packed / "key").read_bytes())
    engine = stock_vllm(tmp_path, packed / "bundle")
    engine.environment |= s3.environment
    engine.command += ["--load-format", "tensorizer", "--model-loader-extra-config"]
    engine.command += [json.dumps({"encryption_keyfile": "s3://llm/the.key"})]
    with engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == [stock_answers[p] for p in PROMPTS]


def test_a_wrong_option_ends_vllm_with_our_words(tmp_path: Path, packed: Path) -> None:
    """Not with half a model."""
    engine: Running = stock_vllm(tmp_path, packed / "bundle")
    engine.command += ["--load-format", "tensorizer", "--model-loader-extra-config"]
    engine.command += [json.dumps({"encryption_keyfil": str(packed / "key")})]
    with engine:
        assert engine.process is not None
        assert engine.process.wait(120) != 0
    assert "Did you mean 'encryption_keyfile'" in engine.text
