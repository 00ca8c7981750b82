"""What vLLM itself, from Python or by its own command, does with bundles of either layout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import tiny_models
import torch
from running import BIN, CPU_ENVIRONMENT, Tensorserve, clean_environment, stock_vllm
from s3server import S3Server
from test_llm import answers
from test_models import PROMPTS, pack

from tensorserve.cli import main as tensorserve


def test_llm_loads_layout_vllm(tmp_path: Path, model_dir: Path) -> None:
    """`LLM(**llm_kwargs(…))`: the same texts as from the model's own directory."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=False)
    settings = pack(model, tmp_path, "vllm")
    key = {"key_file": settings["TENSORSERVE_KEY_FILE"]}
    ours, stock = answers(
        [
            {"uri": settings["TENSORSERVE_MODEL_URI"], "settings": key},
            {"llm": {"model": str(model)}},
        ]
    )
    assert ours == stock


def test_llm_takes_vllms_own_configuration_object(tmp_path: Path, model_dir: Path) -> None:
    """`LLM(model_loader_extra_config=TensorizerConfig(…))`; a reader's option alone, as well."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=True)
    bundle = tmp_path / "bundle-plain"
    assert tensorserve(["pack", str(model), str(bundle)]) == 0
    settings = pack(model, tmp_path)
    sealed = f"{settings['TENSORSERVE_MODEL_URI']}/model.tensors"
    options = {"deserialization_kwargs": {"num_readers": 2}}
    by_object, by_options, stock = answers(
        [
            {
                "llm": {"model": str(model), "load_format": "tensorizer"},
                "tensorizer": {
                    "tensorizer_uri": sealed,
                    "encryption_keyfile": settings["TENSORSERVE_KEY_FILE"],
                },
            },
            {
                "llm": {
                    "model": str(bundle),
                    "load_format": "tensorizer",
                    "model_loader_extra_config": options,
                }
            },
            {"llm": {"model": str(model)}},
        ]
    )
    assert by_object == by_options == stock


def test_llm_kwargs_of_two_ranks(tmp_path: Path, model_dir: Path, s3: S3Server) -> None:
    """From one file in layout hf, in a bucket: one of them fetches it for both."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=True)
    s3.make_bucket("ranks")
    uri, key_file = "s3://ranks/tiny", tmp_path / "key"
    words = [str(BIN / "tensorserve"), "pack", str(model), uri]
    words += ["--encrypt", "--key-file", str(key_file)]
    subprocess.run(words, env=clean_environment() | s3.environment, check=True)
    # One core for each rank: vLLM would otherwise give both the same ones.
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    given = {"key_file": str(key_file), "tensor_parallel_size": 2}
    # vLLM's own way, where each rank reads the manifest for itself.
    options = {"tensorizer_uri": f"{uri}/model.tensors", "encryption_keyfile": str(key_file)}
    by_options = {
        "model": str(model),
        "load_format": "tensorizer",
        "model_loader_extra_config": options,
        "tensor_parallel_size": 2,
    }
    ways = [{"uri": uri, "settings": given}, {"llm": by_options}]
    ours, vllms = answers(ways, **binding, **s3.environment)
    (stock,) = answers([{"llm": {"model": str(model), "tensor_parallel_size": 2}}], **binding)
    assert ours == vllms == stock


def test_layout_vllm_goes_to_a_bucket_under_a_passphrase(
    tmp_path: Path, model_dir: Path, s3: S3Server
) -> None:
    """`pack --layout vllm --passphrase-file` to S3, served from there."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=False)
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("correct horse battery staple")
    s3.make_bucket("layouts")
    words = [str(BIN / "tensorserve"), "pack", str(model), "s3://layouts/v1", "--layout", "vllm"]
    words += ["--encrypt", "--passphrase-file", str(passphrase)]
    subprocess.run(words, env=clean_environment() | CPU_ENVIRONMENT | s3.environment, check=True)
    with stock_vllm(tmp_path, model) as stock:
        stock.wait_ready()
        wanted = stock.completions("model", PROMPTS)
    settings = {
        "TENSORSERVE_MODEL_URI": "s3://layouts/v1",
        "TENSORSERVE_MODEL_NAME": "model",
        "TENSORSERVE_PASSPHRASE_FILE": str(passphrase),
    }
    with Tensorserve(tmp_path, settings | s3.environment) as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == wanted


def test_vllm_serve_of_a_bucket_is_still_refused_by_vllm() -> None:
    """docs/from-vllm-tensorizer.md says so; when vLLM takes it, our pages have to change."""
    done = subprocess.run(
        [str(BIN / "vllm"), "serve", "s3://bucket/model", "--load-format", "tensorizer"],
        env=clean_environment() | CPU_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode != 0
    # It wants the Run:ai streamer for a bucket, whatever the load format.
    assert "runai_model_streamer" in done.stderr
