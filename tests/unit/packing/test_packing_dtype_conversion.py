"""pack --dtype: other floating-point weights, the same model; and --serialization-kwargs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorizer import TensorDeserializer

from hf_samples import ACCESS, make_model, tensors
from tensorserve.bundle.verify import verify
from tensorserve.config.tensorizer_options import encrypting_threads
from tensorserve.errors import ConfigurationError, UsageError
from tensorserve.packing.checkpoint import read_checkpoint
from tensorserve.packing.dtype_conversion import Casting
from tensorserve.packing.pack import pack


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_converted_as_torch_does(tmp_path: Path, dtype: str) -> None:
    """Bit for bit, across the pieces of a large tensor; other kinds of numbers stay."""
    model = make_model(tmp_path / "hf")
    bundle = tmp_path / "bundle"
    pack(model, str(bundle), access=ACCESS, dtype=dtype)
    target = getattr(torch, dtype)
    changed = 0
    with TensorDeserializer(bundle / "model.tensors", device="cpu", verify_hash=True) as found:
        for name, tensor in tensors().items():
            floating = tensor.dtype in {torch.float16, torch.bfloat16, torch.float32, torch.float64}
            wanted = tensor.to(target) if floating else tensor
            changed += wanted.dtype != tensor.dtype
            assert found[name].dtype == wanted.dtype
            assert torch.equal(
                found[name].data.contiguous().view(torch.uint8),
                wanted.contiguous().view(torch.uint8),
            ), name
    assert changed
    config = json.loads((bundle / "config.json").read_text())
    assert dtype in {config.get("dtype"), config.get("torch_dtype")}
    verify(str(bundle), ACCESS, None)


def test_nested_configurations_change_too(tmp_path: Path) -> None:
    """Of models that see and read."""
    model = make_model(tmp_path / "hf")
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "hidden_size": 8}}
    (model / "config.json").write_text(json.dumps(config))
    made = json.loads(Casting(read_checkpoint(model), "bfloat16").config())
    assert made == {
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "hidden_size": 8},
    }


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    """Quantized models, and dtypes that vLLM does not compute in."""
    model = make_model(tmp_path / "hf")
    with pytest.raises(ConfigurationError, match="'int8' is unknown"):
        pack(model, str(tmp_path / "b"), access=ACCESS, dtype="int8")
    (model / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    with pytest.raises(ConfigurationError, match="quantized"):
        pack(model, str(tmp_path / "b"), access=ACCESS, dtype="float16")
    assert not (tmp_path / "b").exists()


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    """Named, instead of an infinity in the bundle; one that was there before may stay."""
    model = tmp_path / "hf"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file(
        {"small": torch.ones(4), "large": torch.tensor([1.0, 7e4])}, model / "model.safetensors"
    )
    with pytest.raises(ConfigurationError, match="'large' has values that float16 cannot hold"):
        pack(model, str(tmp_path / "b"), access=ACCESS, dtype="float16")
    assert not (tmp_path / "b").exists()
    pack(model, str(tmp_path / "b"), access=ACCESS, dtype="bfloat16")
    save_file({"large": torch.tensor([1.0, torch.inf])}, model / "model.safetensors")
    pack(model, str(tmp_path / "c"), access=ACCESS, dtype="float16")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ('{"limit_cpu_concurrency": 0}', "not a number above 0"),
        ('{"limit_cpu_concurrency": true}', "not a number above 0"),
        ('{"compress_tensors": true}', "as they are"),
        ('{"encryption": "key"}', "no option in JSON"),
        ('{"threads": 2}', "does not know"),
    ],
)
def test_options_for_writing_are_honoured_or_refused(text: str, said: str) -> None:
    """Those of tensorizer's TensorSerializer; none is ignored."""
    with pytest.raises(UsageError) as caught:
        encrypting_threads(text)
    assert said in str(caught.value)
    assert encrypting_threads('{"limit_cpu_concurrency": 3, "compress_tensors": false}') == 3
    assert encrypting_threads("{}") is None


def test_every_option_of_tensorizers_writer_is_known() -> None:
    """A later tensorizer's new one fails here."""
    import inspect

    from tensorizer import TensorSerializer

    options = set(inspect.signature(TensorSerializer).parameters) - {"file_obj"}
    assert options == {"limit_cpu_concurrency", "compress_tensors", "encryption"}
