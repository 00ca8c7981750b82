"""LoRA adapters on their way into a bundle, and from it into vLLM's memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_samples import ACCESS, make_model
from tensorserve.bundle.adapters import adapters_of, rank_of
from tensorserve.bundle.download import fetch_artifacts
from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.manifest import read_manifest
from tensorserve.bundle.verify import verify
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError, UsageError
from tensorserve.launch.lora_adapters import hold_adapters
from tensorserve.packing.lora import read_adapters
from tensorserve.packing.pack import pack, with_suffix
from tensorserve.secret import Secret

KEY = Secret(bytes(range(32)), "the test")


def make_adapter(directory: Path, rank: int = 4) -> Path:
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(rank)
    tensors = {
        "base_model.model.q.lora_A.weight": torch.randn(rank, 16, generator=generator),
        "base_model.model.q.lora_B.weight": torch.randn(16, rank).to(torch.bfloat16),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    (directory / "README.md").write_text("how it was trained")
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "hf")


def settings_for(bundle: Path, key: Secret | None, **more: str) -> Settings:
    environ = {"TENSORSERVE_MODEL_URI": str(bundle), **more}
    if key is not None:
        environ["TENSORSERVE_KEY"] = key.reveal().hex()
    return Settings.from_environment(environ)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_an_adapter_comes_out_of_the_bundle_as_it_went_in(
    tmp_path: Path, model: Path, key: Secret | None
) -> None:
    """Bit for bit, readable by the safetensors library, in memory and on no disk."""
    source = make_adapter(tmp_path / "adapter")
    bundle = tmp_path / "bundle"
    result = pack(
        model, str(bundle), access=ACCESS, key=key, adapters=read_adapters([f"sql={source}"])
    )
    assert result.adapters == ("sql",)
    assert "adapters/sql/README.md" in result.left_out
    manifest = read_manifest(str(bundle), ACCESS, key and parse_key(key))
    assert adapters_of(manifest) == ("sql",)
    settings = settings_for(bundle, key)
    directory = tmp_path / "served"
    fetch_artifacts(str(bundle), ACCESS, directory, manifest)

    (adapter,) = hold_adapters(str(bundle), directory, settings, manifest)

    assert (adapter.name, adapter.rank) == ("sql", 4)
    assert adapter.directory == directory / "adapters" / "sql"
    weights = adapter.directory / "adapter_model.safetensors"
    assert str(weights.readlink()).startswith(f"/proc/{os.getpid()}/fd/")
    found, wanted = load_file(weights), load_file(source / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_damaged_adapter_is_found_and_named(tmp_path: Path, model: Path) -> None:
    """By `verify`, and before vLLM is started."""
    bundle = tmp_path / "bundle"
    adapters = read_adapters([f"sql={make_adapter(tmp_path / 'adapter')}"])
    pack(model, str(bundle), access=ACCESS, key=KEY, adapters=adapters)
    path = bundle / "adapters" / "sql" / "adapter_model.tensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"adapters/sql/adapter_model\.tensors"):
        verify(str(bundle), ACCESS, parse_key(KEY))
    directory = tmp_path / "served"
    manifest = read_manifest(str(bundle), ACCESS, parse_key(KEY))
    fetch_artifacts(str(bundle), ACCESS, directory, manifest)
    with pytest.raises(CorruptError, match=r"adapter_model\.tensors"):
        hold_adapters(str(bundle), directory, settings_for(bundle, KEY), manifest)
    assert not (directory / "adapters" / "sql" / "adapter_model.safetensors").is_symlink()


def test_adapters_that_do_not_fit_the_memory_are_refused(tmp_path: Path, model: Path) -> None:
    """Before one byte of them is fetched."""
    bundle = tmp_path / "bundle"
    source = make_adapter(tmp_path / "adapter", rank=4096)  # 320 KiB of weights
    (bundle.parent / "x").mkdir()
    pack(model, str(bundle), access=ACCESS, adapters=read_adapters([f"sql={source}"]))
    manifest = read_manifest(str(bundle), ACCESS, None)
    directory = tmp_path / "served"
    fetch_artifacts(str(bundle), ACCESS, directory, manifest)
    settings = settings_for(bundle, None, TENSORSERVE_HOST_MEMORY_LIMIT="64MiB")
    object.__setattr__(settings, "host_memory_limit", 100_000)
    with pytest.raises(ConfigurationError, match="TENSORSERVE_HOST_MEMORY_LIMIT"):
        hold_adapters(str(bundle), directory, settings, manifest)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sql", "not NAME=PATH"),
        ("../x=/tmp", "the name may have"),
        ("a/b=/tmp", "the name may have"),
        (".=/tmp", "the name may have"),
        ("sql=/does/not/exist", "not a directory"),
    ],
)
def test_what_is_no_adapter_is_refused(text: str, said: str) -> None:
    """With the reason."""
    with pytest.raises(ConfigurationError, match=said):
        read_adapters([text])


def test_incomplete_adapters_are_refused(tmp_path: Path) -> None:
    """No configuration, no weights, pickles, another method, the same name twice."""
    good = make_adapter(tmp_path / "good")
    with pytest.raises(ConfigurationError, match="twice"):
        read_adapters([f"a={good}", f"a={good}"])
    (good / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "r": 4}))
    with pytest.raises(ConfigurationError, match="IA3"):
        read_adapters([f"a={good}"])
    (good / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="not a valid LoRA configuration"):
        read_adapters([f"a={good}"])
    (good / "adapter_config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"adapter_config\.json does not exist"):
        read_adapters([f"a={good}"])
    pickled = make_adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match="pickle"):
        read_adapters([f"a={pickled}"])


def test_the_largest_rank_counts() -> None:
    """Single modules may have a rank of their own."""
    config = {"r": 8, "rank_pattern": {"q_proj": 64}}
    assert rank_of(json.dumps(config).encode(), "here") == 64
    with pytest.raises(ConfigurationError):
        rank_of(b'{"r": 0}', "here")
    with pytest.raises(ConfigurationError):
        rank_of(b"[" * 100_000, "here")


def test_a_suffix_is_vllms_own_layout() -> None:
    """DEST/vllm/<model>/<suffix>; what would leave that is refused."""
    assert with_suffix("s3://bucket/", "my-model", "v1") == "s3://bucket/vllm/my-model/v1"
    for suffix in ("", "..", "../x", "/x", "."):
        with pytest.raises(UsageError):
            with_suffix("s3://bucket", "my-model", suffix)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_vllm_does_not_serve_is_not_packed(
    tmp_path: Path, more: dict[str, object], words: str
) -> None:
    """Both of us refuse it, vLLM as late as when it is loaded."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    source = make_adapter(tmp_path / "a")
    document = {"r": 4, "lora_alpha": 8, "target_modules": ["q"], "peft_type": "LORA", **more}
    (source / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError):  # noqa: PT011 - of many words
        PEFTHelper.from_local_dir(str(source), None).validate_legal(LoRAConfig(max_lora_rank=16))
    with pytest.raises(ConfigurationError, match=words):
        read_adapters([f"sql={source}"])


@pytest.mark.parametrize(
    "more",
    [
        {"use_rslora": True},
        {"modules_to_save": ["score"]},
        {"init_lora_weights": "gaussian"},
        {"use_dora": False, "bias": "none", "modules_to_save": None, "layer_replication": None},
    ],
    ids=["rslora", "score", "gaussian", "defaults"],
)
def test_an_adapter_that_vllm_serves_is_packed(tmp_path: Path, more: dict[str, object]) -> None:
    """Its configuration goes along as it is: how it is scaled, for one."""
    source = make_adapter(tmp_path / "a")
    document = {"r": 4, "lora_alpha": 8, "target_modules": ["q"], "peft_type": "LORA", **more}
    (source / "adapter_config.json").write_text(json.dumps(document))
    assert "sql" in read_adapters([f"sql={source}"])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_dangling_link_of_an_adapter_is_named(tmp_path: Path, name: str) -> None:
    """With what it leads to."""
    source = make_adapter(tmp_path / "a")
    (source / name).unlink()
    (source / name).symlink_to("../blobs/0123")
    with pytest.raises(ConfigurationError, match=rf"{name} is a link to \.\./blobs/0123"):
        read_adapters([f"sql={source}"])
