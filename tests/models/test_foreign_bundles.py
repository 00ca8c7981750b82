"""Bundles that others wrote: tensorizer itself, and vLLM's own example path.

What they hold is served as stock vLLM serves the checkpoint; what no model can take is refused by
name before vLLM starts (docs/bundle-format.md, "Bundles made by others").
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import torch
from running import BIN, CPU_ENVIRONMENT, Tensorserve, clean_environment, stock_vllm
from s3server import free_ports
from tensorizer import EncryptionParams
from tensorizer_writer import add_small_files, write_bundle
from transformers import AutoModelForCausalLM

PROMPTS = ["The capital of France is", "1 2 3 4"]
KEY = bytes(range(100, 132))
PASSPHRASE = "correct horse battery staple"
SEALED_BY = {
    "nothing": {},
    "a key": {"TENSORSERVE_KEY": KEY.hex()},
    "a passphrase": {"TENSORSERVE_PASSPHRASE": PASSPHRASE},
}
WRITER = Path(__file__).with_name("vllm_writer.py")

Answers = list[tuple[str, list[float]]]


@dataclass(frozen=True)
class Model:
    """A checkpoint, and what stock vLLM answers from it."""

    directory: Path
    answers: Answers


def ask_stock(directory: Path, model: Path) -> Answers:
    with stock_vllm(directory, model) as engine:
        engine.wait_ready()
        return engine.completions("model", PROMPTS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Model:
    """A tied head: tensorizer stores it under both names."""
    base = tmp_path_factory.mktemp("tiny")
    model = tiny_models.llama(base / "model", model_dir, torch.bfloat16, tied=True)
    return Model(model, ask_stock(base, model))


def params(sealed_by: str) -> EncryptionParams | None:
    if sealed_by == "a key":
        return EncryptionParams(key=KEY)
    if sealed_by == "a passphrase":
        # tensorizer's default takes half a second and 256 MiB, each time that the file is opened.
        cheap = EncryptionParams.OpsLimit.MIN, EncryptionParams.MemLimit.MIN
        return EncryptionParams.from_string(PASSPHRASE, opslimit=cheap[0], memlimit=cheap[1])
    return None


def write(model: Path, bundle: Path, writer: str, sealed_by: str = "nothing") -> Path:
    """`model` as tensorizer writes it, with the small files beside it."""
    module = AutoModelForCausalLM.from_pretrained(model)
    content = module if writer == "write_module" else module.state_dict()
    return write_bundle(content, model, bundle, params(sealed_by))


def command(word: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """One of our commands, as a user gives it."""
    return subprocess.run(
        [str(BIN / "tensorserve"), word, *arguments],
        env=clean_environment() | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def free() -> dict[str, str]:
    """Ports for `check` to find free."""
    api, metrics = free_ports(2)
    return {"TENSORSERVE_PORT": str(api), "TENSORSERVE_METRICS_PORT": str(metrics)}


# tensorizer's own writer ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writer", "sealed_by"),
    [
        ("write_module", "nothing"),
        ("write_module", "a key"),
        ("write_state_dict", "a key"),
        ("write_state_dict", "a passphrase"),
    ],
)
def test_files_of_tensorizers_own_are_served(
    tmp_path: Path, tiny: Model, writer: str, sealed_by: str
) -> None:
    """Text and log-probabilities of stock vLLM, to the last bit. (`write_module` and a passphrase:
    test_serving.py, with the real model.)"""
    bundle = write(tiny.directory, tmp_path / "bundle", writer, sealed_by)
    settings = {"TENSORSERVE_MODEL_URI": str(bundle)} | SEALED_BY[sealed_by]
    with Tensorserve(tmp_path, settings) as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == tiny.answers


@pytest.mark.parametrize("writer", ["write_module", "write_state_dict"])
@pytest.mark.parametrize("sealed_by", SEALED_BY)
def test_files_of_tensorizers_own_are_verified(
    tmp_path: Path, tiny: Model, writer: str, sealed_by: str
) -> None:
    """Whole, every tensor is fine; with one flipped bit, its tensor is named."""
    bundle = write(tiny.directory, tmp_path / "bundle", writer, sealed_by)
    key = SEALED_BY[sealed_by]
    whole = command("verify", str(bundle), **key)
    assert whole.returncode == 0, whole.stderr
    assert "ok         model.tensors" in whole.stdout
    assert "unchecked  config.json" in whole.stdout
    path = bundle / "model.tensors"
    with path.open("r+b") as file:
        # The embedding is the largest by far: it covers the middle of the file's first half.
        file.seek(path.stat().st_size // 4)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    damaged = command("verify", str(bundle), **key)
    assert damaged.returncode == 65
    assert "'model.embed_tokens.weight'" in damaged.stdout


def test_tensors_that_the_model_does_not_know_are_named(tmp_path: Path, tiny: Model) -> None:
    """A state dict of a wrapped module, for example: the engine ends with 65 and says which."""
    state = AutoModelForCausalLM.from_pretrained(tiny.directory).state_dict()
    wrapped = {f"wrapped.{name}": tensor for name, tensor in state.items()}
    bundle = write_bundle(wrapped, tiny.directory, tmp_path / "bundle")
    with Tensorserve(tmp_path, {"TENSORSERVE_MODEL_URI": str(bundle)}) as engine:
        assert engine.process is not None
        assert engine.process.wait(120) == 65
        assert "LlamaForCausalLM" in engine.text
        assert "wrapped.model.embed_tokens.weight" in engine.text


def test_tensors_without_data_are_refused_before_vllm_starts(tmp_path: Path, tiny: Model) -> None:
    """A model that was on torch's meta device, in part, when it was written."""
    state = AutoModelForCausalLM.from_pretrained(tiny.directory).state_dict()
    state["model.norm.weight"] = state["model.norm.weight"].to("meta")
    bundle = write_bundle(state, tiny.directory, tmp_path / "bundle")
    done = command("check", TENSORSERVE_MODEL_URI=str(bundle), **free())
    assert done.returncode == 65
    assert "no data, for example 'model.norm.weight'" in done.stderr


def test_experts_that_transformers_holds_fused_are_served(tmp_path: Path, model_dir: Path) -> None:
    """Its checkpoint has each expert alone; its module, which tensorizer writes, all in one."""
    model = tiny_models.mixture_of_experts(tmp_path / "model", model_dir, torch.bfloat16)
    wanted = ask_stock(tmp_path, model)
    bundle = write(model, tmp_path / "bundle", "write_module")
    with Tensorserve(tmp_path, {"TENSORSERVE_MODEL_URI": str(bundle)}) as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == wanted


# vLLM's own path --------------------------------------------------------------------------------


def write_with_vllm(model: Path, bundle: Path, *arguments: str, unpacked: bool = False) -> str:
    """What vLLM's own example path makes of `model`, with the small files; gives what it printed.

    It ends with an error always: its last step asks a hub for the small files.
    """
    bundle.mkdir()
    done = subprocess.run(
        [sys.executable, str(WRITER), str(model), str(bundle / "model.tensors"), *arguments],
        env=clean_environment() | CPU_ENVIRONMENT | ({"UNPACKED": "1"} if unpacked else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (bundle / "model.tensors").exists(), done.stderr
    add_small_files(model, bundle)
    return done.stderr


def test_what_vllm_writes_on_a_gpu_is_served(tmp_path: Path, tiny: Model) -> None:
    """vLLM's own code writes it, encrypted, with the weights where a GPU's engine has them."""
    key_file = tmp_path / "key"
    write_with_vllm(tiny.directory, tmp_path / "bundle", str(key_file), unpacked=True)
    settings = {
        "TENSORSERVE_MODEL_URI": str(tmp_path / "bundle"),
        "TENSORSERVE_KEY_FILE": str(key_file),
    }
    assert command("verify", str(tmp_path / "bundle"), **settings).returncode == 0
    # It holds one rank's parameters.
    for_two = command("check", **settings, **free(), TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE="2")
    assert for_two.returncode == 78
    assert "this start has 2 ranks" in for_two.stderr
    with Tensorserve(tmp_path, settings) as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == tiny.answers
        events = engine.events()
    (plan,) = [e for e in events if e["event"] == "load_plan"]
    assert plan["tensors"] > 12, "fused parameters and their buffers"


def test_what_vllms_cpu_build_writes_is_refused(tmp_path: Path, tiny: Model) -> None:
    """Its weights are not in it. `check` says so, and `up`, before vLLM starts; `verify` too."""
    bundle = tmp_path / "bundle"
    write_with_vllm(tiny.directory, bundle)
    settings = {"TENSORSERVE_MODEL_URI": str(bundle)}
    for word, *arguments in (["check"], ["verify", str(bundle)]):
        done = command(word, *arguments, **settings, **free())
        assert done.returncode == 65
        assert "qkv_proj.weight" in done.stdout + done.stderr
        assert "vLLM's CPU build" in done.stdout + done.stderr
    with Tensorserve(tmp_path, settings) as engine:
        assert engine.process is not None
        assert engine.process.wait(60) == 65
        assert "vLLM's CPU build" in engine.text
        assert "vllm serve" not in engine.text


def test_what_vllms_cpu_build_leaves_when_it_encrypts_is_refused(
    tmp_path: Path, tiny: Model
) -> None:
    """It crashes at the first weight that it had emptied; the file's index is empty then."""
    bundle, key_file = tmp_path / "bundle", tmp_path / "key"
    said = write_with_vllm(tiny.directory, bundle, str(key_file))
    assert "IndexError: tuple index out of range" in said
    settings = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY_FILE": str(key_file)}
    done = command("check", **settings, **free())
    assert done.returncode == 65
    assert "holds no tensors" in done.stdout + done.stderr
