"""What vLLM's own functions read in the served directory is what they read in the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_samples import ACCESS, make_model
from tensorserve.bundle.download import fetch_artifacts
from tensorserve.bundle.manifest import read_manifest
from tensorserve.packing.pack import pack

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 700,
}  # fmt: skip


def served(model: Path, directory: Path, *, code: bool = False) -> Path:
    """Where vLLM would look at a start from a bundle of `model`."""
    bundle = directory / "bundle"
    pack(model, str(bundle), access=ACCESS, trust_remote_code=code)
    manifest = read_manifest(str(bundle), ACCESS, None)
    fetch_artifacts(str(bundle), ACCESS, directory / "served", manifest, remote_code=code)
    return directory / "served"


def test_pooling_behind_a_link_is_the_same(tmp_path: Path) -> None:
    """Mean instead of the first token: it says so in a folder that is a link."""
    from vllm.transformers_utils.config import get_pooling_config

    model = make_model(tmp_path / "hf")
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
    ]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (model / "1_Pooling").rename(tmp_path / "elsewhere")
    (model / "1_Pooling").symlink_to("../elsewhere")
    wanted = get_pooling_config(str(model))
    assert wanted is not None
    assert wanted["seq_pooling_type"] == "MEAN"
    assert get_pooling_config(str(served(model, tmp_path))) == wanted


def test_a_configuration_of_the_models_own_code_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the code imports comes with it."""
    from transformers import dynamic_module_utils
    from vllm.transformers_utils.config import get_config

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = make_model(tmp_path / "hf")
    named = {"model_type": "own_llama", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (model / "config.json").write_text(json.dumps(LLAMA | named))
    (model / "own_name.py").write_text('NAME = "own_llama"\n')
    (model / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\nfrom .own_name import NAME\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = NAME\n"
    )
    directory = served(model, tmp_path, code=True)
    ours, wanted = (get_config(str(place), trust_remote_code=True) for place in (directory, model))
    assert type(ours).__name__ == type(wanted).__name__ == "OwnConfig"
    assert ours.to_diff_dict() == wanted.to_diff_dict()
