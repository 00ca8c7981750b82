"""Two real ranks: from a file each in vLLM's layout, ours or foreign, and from one that they share.

A tiny random Llama: what is tested is where the bytes go. The foreign shards are cut here by the
rules of vLLM's Llama (fused qkv and gate_up; columns and rows split between ranks), ours by vLLM.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from engine_processes import named_processes, ways
from running import BIN, Tensorserve, clean_environment, session_processes, stock_vllm
from s3server import S3Server
from tensorizer import EncryptionParams, TensorSerializer
from transformers import LlamaConfig, LlamaForCausalLM

RANKS = 2
KEY = bytes(range(32))
PROMPTS = ["The capital of France is", "1 2 3 4"]
# One core for each rank: vLLM would otherwise give both the same ones.
BINDING = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A Llama with SmolLM2's tokenizer and random weights, as a Hugging Face directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
    )
    directory = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((model_dir / name).read_bytes())
    return directory


Answers = list[tuple[str, list[float]]]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Answers:
    """What stock vLLM answers with two ranks."""
    stock = stock_vllm(tmp_path_factory.mktemp("stock"), tiny)
    stock.command += ["--tensor-parallel-size", str(RANKS)]
    stock.environment |= BINDING
    with stock:
        stock.wait_ready()
        return stock.completions("model", PROMPTS)


def shard(model: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """What `rank` of vLLM's Llama holds, under vLLM's names."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(RANKS, 0)[rank].clone()

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(RANKS, 1)[rank].clone()

    held: dict[str, torch.Tensor] = {}
    for name, tensor in model.items():
        if name.endswith(("q_proj.weight", "gate_proj.weight")):
            gate = name.endswith("gate_proj.weight")
            parts = ("gate_proj", "up_proj") if gate else ("q_proj", "k_proj", "v_proj")
            fused = "gate_up_proj" if gate else "qkv_proj"
            pieces = [rows(model[name.replace(parts[0], part)]) for part in parts]
            held[name.replace(parts[0], fused)] = torch.cat(pieces)
        elif name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            continue
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            held[name] = columns(tensor)
        elif name.endswith("embed_tokens.weight"):
            held[name] = rows(tensor)
        else:
            held[name] = tensor.clone()
    held["vllm_tensorized_marker"] = torch.tensor((1,), device="meta")
    return held


def test_foreign_shards_in_vllms_layout_are_loaded_in_place(
    tmp_path: Path, tiny: Path, wanted: Answers
) -> None:
    """Two ranks, each its own encrypted file; the answers are those of stock vLLM."""
    from safetensors.torch import load_file

    bundle = tmp_path / "bundle"
    bundle.mkdir()
    model = load_file(tiny / "model.safetensors")
    for rank in range(RANKS):
        path = bundle / f"model-rank-{rank:03d}.tensors"
        serializer = TensorSerializer(str(path), encryption=EncryptionParams(key=KEY))
        serializer.write_state_dict(shard(model, rank))
        serializer.close()
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (bundle / name).write_bytes((tiny / name).read_bytes())
    environ = BINDING | {
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_KEY": KEY.hex(),
        "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": str(RANKS),
    }
    with Tensorserve(tmp_path, environ) as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == wanted
        for rank in range(RANKS):
            size = engine.metric("tensorserve_load_size_bytes", rank=str(rank))
            assert size
            copied = engine.metric("tensorserve_load_bytes_total", rank=str(rank), stage="copy")
            assert copied == size


def test_shards_made_with_vllm_are_loaded_by_their_ranks(
    tmp_path: Path, tiny: Path, wanted: Answers
) -> None:
    """`pack --tensor-parallel-size 2`, encrypted: each rank reads its own file, and only that.
    Another engine than that of the bundle is refused before vLLM is started."""
    bundle, key_file = tmp_path / "bundle", tmp_path / "key"
    words = [str(BIN / "tensorserve"), "pack", str(tiny), str(bundle)]
    words += ["--tensor-parallel-size", str(RANKS), "--encrypt", "--key-file", str(key_file)]
    packed = subprocess.run(
        words, env=clean_environment(), check=False, capture_output=True, text=True
    )
    assert packed.returncode == 0, packed.stderr
    assert "in 2 files, encrypted" in packed.stdout
    settings = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY_FILE": str(key_file)}
    for ranks, dtype, said in (
        ("1", "auto", "tensor-parallel size: the bundle has 2, this start 1"),
        ("2", "float16", "dtype: the bundle has bfloat16, this start float16"),
    ):
        flags = {
            "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": ranks,
            "TENSORSERVE_VLLM_DTYPE": dtype,
        }
        with Tensorserve(tmp_path, settings | flags) as refused:
            assert refused.process is not None
            assert refused.process.wait(60) == 78
            assert said in refused.text
            assert not [e for e in refused.events() if e.get("phase") == "import"]
        shutil.rmtree(refused.state_dir)
    settings["TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE"] = str(RANKS)
    with Tensorserve(tmp_path, BINDING | settings) as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == wanted
        events = engine.events()
    whole = (tiny / "model.safetensors").stat().st_size
    for rank in range(RANKS):
        (plan,) = [e for e in events if e["event"] == "load_plan" and e["rank"] == rank]
        # Its half, and the norms.
        assert 0.49 * whole < plan["bytes"] < 0.55 * whole


@pytest.mark.parametrize("prefetch", ["auto", "off"])
def test_ranks_share_one_file_and_fetch_it_once(
    tmp_path: Path, tiny: Path, wanted: Answers, s3: S3Server, prefetch: str
) -> None:
    """Hugging Face layout on S3: over the network it comes once, with and without prefetching.

    With prefetch vLLM is imported in each process (TENSORSERVE_IMPORT_ONCE=off), and each rank
    opens all of the file. Without it vLLM is imported once, and each rank opens a half, for both
    (TENSORSERVE_SHARE_LOAD=on). The answers are those of stock vLLM both times.
    """
    s3.make_bucket(f"prefetch-{prefetch}")
    uri = f"s3://prefetch-{prefetch}/tiny"
    words = [str(BIN / "tensorserve"), "pack", str(tiny), uri, "--encrypt"]
    key_file = tmp_path / "key"
    subprocess.run(
        [*words, "--key-file", str(key_file)], env=clean_environment() | s3.environment, check=True
    )
    settings = {
        "TENSORSERVE_MODEL_URI": uri,
        "TENSORSERVE_KEY_FILE": str(key_file),
        "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": str(RANKS),
        "TENSORSERVE_PREFETCH": prefetch,
    }
    spawn = prefetch == "auto"
    shares = not spawn
    settings["TENSORSERVE_SHARE_LOAD"] = "on" if shares else "auto"
    environ = BINDING | s3.environment | settings
    with Tensorserve(tmp_path, environ, spawn=spawn) as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == wanted
        assert named_processes(engine).keys() >= {"EngineCore", "Worker_TP0", "Worker_TP1"}
        if spawn:
            assert ways(engine) == {None: ("spawn", "TENSORSERVE_IMPORT_ONCE=off")}
        events = engine.events()
        assert engine.process is not None
        assert engine.stop() == 143
        assert session_processes(engine.process.pid) == []
    ahead = [e for e in events if e["event"] == "prefetch_progress"]
    size = sum(e["bytes"] for e in events if e["event"] == "load_plan" and e["rank"] == 0)
    assert size <= ahead[-1]["bytes"] < 1.1 * size
    opened = 0
    for rank in range(RANKS):
        (plan,) = [e for e in events if e["event"] == "load_plan" and e["rank"] == rank]
        assert plan["sharing"] == ("shared" if shares else "auto")
        (*_, last) = [e for e in events if e["event"] == "load_progress" and e["rank"] == rank]
        assert last["fetch"] == last["decrypt"] == plan["opens"]
        assert last["copy"] == plan["bytes"] == size
        opened += plan["opens"]
        # To open it, and to read its index and prove the key: no request for weights.
        assert last["requests"] <= 6, last
    assert opened == (size if shares else RANKS * size)
