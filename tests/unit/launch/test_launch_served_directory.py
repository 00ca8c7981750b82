"""The model directory of a start: what is in it, and what is refused instead of left out."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensorserve.bundle.manifest import read_manifest
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.engine.api import own_start
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.launch.preflight import check_source
from tensorserve.launch.served_directory import make_model_dir
from tensorserve.packing.pack import pack
from tensorserve.packing.pack_result import PackResult
from tensorserve.secret import Secret
from tensorserve.sources import Access

KEY = Secret(bytes(range(32)), "the test")
DENSE = {"linear.weight": torch.randn(4, 16)}


def make_model(directory: Path, *, weights: str = "model.safetensors") -> Path:
    directory.mkdir()
    save_file({"norm.weight": torch.ones(16, dtype=torch.float16)}, directory / weights)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def add_dense(model: Path, file: str = "model.safetensors") -> Path:
    """sentence-transformers' layer behind the pooling."""
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "config.json").write_text('{"in_features": 16, "out_features": 4}')
    if file.endswith(".bin"):
        (model / "2_Dense" / file).write_bytes(b"a pickle")
    elif file:
        save_file(DENSE, model / "2_Dense" / file)
    dense = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (model / "modules.json").write_text(json.dumps([dense]))
    return model


def packed(model: Path, *, sealed: bool = True) -> tuple[Path, PackResult]:
    bundle = model.with_name("bundle")
    return bundle, pack(model, str(bundle), access=Access(), key=KEY if sealed else None)


def served(bundle: Path, *flags: str, sealed: bool = True, **more: str) -> Path:
    """As `check` looks at it first, and `serve` then makes it."""
    environ = {
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_STATE_DIR": str(bundle.with_name("state")),
    } | more
    if sealed:
        environ["TENSORSERVE_KEY"] = KEY.reveal().hex()
    settings = Settings.from_environment(environ)
    plan = make_plan(settings, flags)
    weights = check_source(settings, plan)
    make_model_dir(plan, settings, weights.manifest, weights.index)
    return plan.model_dir


def names(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("sealed", [True, False])
def test_nested_weights_are_where_vllm_looks_for_them(tmp_path: Path, sealed: bool) -> None:
    """From memory, the same tensors; sealed in the bundle."""
    bundle, result = packed(add_dense(make_model(tmp_path / "hf")), sealed=sealed)
    assert result.nested == ("2_Dense/model.safetensors",)
    assert "2_Dense/model.safetensors" not in result.left_out
    stored = (bundle / "2_Dense" / "model.safetensors.tensors").read_bytes()
    plain = DENSE["linear.weight"].numpy().tobytes()
    assert (plain in stored) is not sealed
    path = served(bundle, sealed=sealed) / "2_Dense" / "model.safetensors"
    assert str(path.readlink()).startswith("/proc/")
    assert torch.equal(load_file(path)["linear.weight"], DENSE["linear.weight"])


def test_dense_as_a_pickle_is_not_packed(tmp_path: Path) -> None:
    """vLLM would open it; the message says how to convert it, and nothing is written."""
    model = add_dense(make_model(tmp_path / "hf"), "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="is a pickle, and vLLM needs") as raised:
        packed(model)
    assert "save_file(" in str(raised.value.hint)
    assert not (tmp_path / "bundle").exists()


def test_a_pickle_beside_safetensors_is_not_needed(tmp_path: Path) -> None:
    """vLLM takes the safetensors file first."""
    model = add_dense(make_model(tmp_path / "hf"))
    (model / "2_Dense" / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "2_Dense/model.safetensors" in names(served(packed(model)[0]))


def test_dense_without_weights_is_not_packed(tmp_path: Path) -> None:
    """An interrupted download: vLLM would leave the layer out and say nothing."""
    with pytest.raises(CorruptError, match=r"2_Dense, which has no model\.safetensors"):
        packed(add_dense(make_model(tmp_path / "hf"), ""))


@pytest.mark.parametrize("path", ["", "../outside", "/etc", "a/../../b"])
def test_a_dense_layer_outside_of_the_model_is_refused(tmp_path: Path, path: str) -> None:
    """At its root it would be the model's own file."""
    model = add_dense(make_model(tmp_path / "hf"))
    dense = {"path": path, "type": "sentence_transformers.models.Dense"}
    (model / "modules.json").write_text(json.dumps([dense]))
    with pytest.raises(CorruptError, match="which is not a folder of the model"):
        packed(model)


@pytest.mark.parametrize("configured", [True, False])
def test_a_bundle_whose_dense_layer_stayed_behind_is_refused(
    tmp_path: Path, configured: bool
) -> None:
    """An older one: other vectors without a word. `check` says so, before anything is made.

    Where a source cannot list, nobody knows of the layer's configuration either.
    """
    model = make_model(tmp_path / "hf")
    bundle, _ = packed(model, sealed=False)
    for file in ("modules.json", "2_Dense/config.json"):
        (bundle / file).parent.mkdir(exist_ok=True)
    add_dense(make_model(tmp_path / "dense"))
    shutil.copy(tmp_path / "dense" / "modules.json", bundle)
    if configured:
        shutil.copy(tmp_path / "dense" / "2_Dense" / "config.json", bundle / "2_Dense")
    (bundle / "manifest.json").unlink()
    with pytest.raises(
        CorruptError, match="Dense layer in 2_Dense, but the bundle lacks its weights"
    ):
        served(bundle, sealed=False)
    assert not (tmp_path / "state" / "model").exists()


@pytest.mark.parametrize(
    "name",
    ["adapters/retrieval/adapter_model", "whisper-large-v3/model", "audio_tokenizer/model"],
)
def test_weights_that_a_models_class_opens_come_along(tmp_path: Path, name: str) -> None:
    """Jina's adapters, the encoders of Kimi-Audio and MiMo-Audio; no LoRA adapter is made of it."""
    model = make_model(tmp_path / "hf")
    file = model / f"{name}.safetensors"
    file.parent.mkdir(parents=True)
    save_file(DENSE, file)
    bundle, _ = packed(model)
    assert load_file(served(bundle) / f"{name}.safetensors").keys() == DENSE.keys()


def test_other_weights_below_the_model_stay_behind(tmp_path: Path) -> None:
    """A second copy in `original/`, which vLLM does not read."""
    model = make_model(tmp_path / "hf")
    (model / "original").mkdir()
    save_file(DENSE, model / "original" / "model.safetensors")
    bundle, result = packed(model)
    assert "original/model.safetensors" in result.left_out
    assert names(served(bundle)) == {"config.json", "tokenizer.json", "model.safetensors"}


def test_weights_in_memory_count_against_the_limit(tmp_path: Path) -> None:
    """Said by `check` too, with the variable that raises it."""
    model = add_dense(make_model(tmp_path / "hf"))
    large = {"linear.weight": torch.zeros(65 * 1024**2, dtype=torch.uint8)}
    save_file(large, model / "2_Dense" / "model.safetensors")
    bundle, _ = packed(model, sealed=False)
    with pytest.raises(ConfigurationError, match="TENSORSERVE_HOST_MEMORY_LIMIT is"):
        served(bundle, sealed=False, TENSORSERVE_HOST_MEMORY_LIMIT="64MiB")


def test_a_damaged_nested_file_ends_the_start(tmp_path: Path) -> None:
    """vLLM itself would log it and leave the layer out."""
    bundle, _ = packed(add_dense(make_model(tmp_path / "hf")))
    path = bundle / "2_Dense" / "model.safetensors.tensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError):
        served(bundle)


def test_a_model_with_params_alone_is_a_mistral(tmp_path: Path) -> None:
    """As in its own repository; the file's name is what tells vLLM."""
    model = make_model(tmp_path / "hf", weights="consolidated.safetensors")
    (model / "config.json").rename(model / "params.json")
    bundle, _ = packed(model)
    wanted = {"params.json", "tokenizer.json", "consolidated.safetensors"}
    assert names(served(bundle)) == wanted


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_a_bundle_without_stand_ins_gets_one(tmp_path: Path, name: str) -> None:
    """One of an older release, or that tensorizer wrote: no manifest, the index alone."""
    bundle, _ = packed(make_model(tmp_path / "hf"), sealed=False)
    (bundle / "manifest.json").unlink()
    (bundle / "model.safetensors").unlink()
    (bundle / "config.json").rename(bundle / name)
    made = "consolidated.safetensors" if name == "params.json" else "model.safetensors"
    assert made in names(served(bundle, sealed=False))


def test_no_configuration_at_all_is_said_before_the_start(tmp_path: Path) -> None:
    """65, and what is missing."""
    bundle, _ = packed(make_model(tmp_path / "hf"), sealed=False)
    (bundle / "config.json").unlink()
    with pytest.raises(CorruptError, match=r"has no config\.json"):
        served(bundle, sealed=False)


def test_a_class_that_reads_pickles_is_refused_before_the_start(tmp_path: Path) -> None:
    """Asked for by a flag, or in config.json."""
    model = make_model(tmp_path / "hf")
    bundle, _ = packed(model)
    overrides = '--hf-overrides={"architectures": ["BgeM3EmbeddingModel"]}'
    with pytest.raises(ConfigurationError, match="BgeM3EmbeddingModel, which reads pickles"):
        served(bundle, overrides)
    (model / "config.json").write_text('{"architectures": ["BgeM3EmbeddingModel"]}')
    with pytest.raises(ConfigurationError, match=r"sparse_linear\.pt"):
        pack(model, str(tmp_path / "other"), access=Access())


def test_a_stand_in_that_holds_data_ends_the_start(tmp_path: Path) -> None:
    """In a bundle that is not authenticated: weights come from the .tensors files only."""
    bundle, _ = packed(make_model(tmp_path / "hf"), sealed=False)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    shutil.copy(tmp_path / "hf" / "model.safetensors", bundle)
    content = (bundle / "model.safetensors").read_bytes()

    for entry in manifest["files"]:
        if entry["name"] == "model.safetensors":
            entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match="not a safetensors header alone"):
        served(bundle, sealed=False)


def test_vllm_on_the_bundle_itself_is_told_what_it_misses(tmp_path: Path) -> None:
    """`vllm serve BUNDLE --load-format tensorizer` would leave the Dense layer out."""
    bundle, _ = packed(add_dense(make_model(tmp_path / "hf")))
    environ = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY": KEY.reveal().hex()}
    with pytest.raises(ConfigurationError, match=r"2_Dense/model\.safetensors sealed"):
        own_start(environ, 1, str(bundle))
    assert own_start(environ, 1, str(tmp_path / "hf")).shards


def test_a_planted_header_is_noticed_in_a_bundle_read_in_place(tmp_path: Path) -> None:
    """It would make another kind of model of it; the manifest does not name it."""
    bundle, _ = packed(make_model(tmp_path / "hf"))
    environ = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY": KEY.reveal().hex()}
    assert own_start(environ, 1, str(bundle)).shards
    shutil.copy(bundle / "model.safetensors", bundle / "consolidated.safetensors")
    with pytest.raises(CorruptError, match=r"consolidated\.safetensors: not in manifest\.json"):
        own_start(environ, 1, str(bundle))


def test_an_older_release_passes_over_what_it_does_not_know(tmp_path: Path) -> None:
    """The manifest is of the same version; stand-ins are small files, nested weights .tensors."""
    bundle, _ = packed(add_dense(make_model(tmp_path / "hf")), sealed=False)
    manifest = read_manifest(str(bundle), Access(), None)
    assert manifest is not None
    assert manifest.version == 2
    assert {entry.name for entry in manifest.files} >= {"model.safetensors", "config.json"}
    assert set(manifest.tensors_files) == {
        "model.tensors",
        "2_Dense/model.safetensors.tensors",
    }
