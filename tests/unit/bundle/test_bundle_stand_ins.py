"""Headers without data, where vLLM looks for weights: what they say, and that nobody reads more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tensorserve.bundle.layout import RANK_MARKER
from tensorserve.bundle.stand_ins import check_stand_in, stand_in_of_index, stand_ins_of
from tensorserve.errors import CorruptError
from tensorserve.format import TensorSpec, plan_file
from tensorserve.format.safetensors import read_safetensors

HALF = torch.ones(4, 2, dtype=torch.float16)
WHOLE = torch.ones(3, dtype=torch.int32)


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, {"format": "pt", "trained_on": "what is private"})
    return path


def header(data: bytes) -> dict[str, object]:
    length = int.from_bytes(data[:8], "little")
    assert len(data) == 8 + length
    content = json.loads(data[8:])
    assert isinstance(content, dict)
    return content


def told(data: bytes) -> dict[str, tuple[str, list[int]]]:
    """{name: (dtype, shape)}."""
    return {
        name: (entry["dtype"], entry["shape"])
        for name, entry in header(data).items()
        if name != "__metadata__" and isinstance(entry, dict)
    }


def test_it_says_what_the_original_says(tmp_path: Path) -> None:
    """Names, dtypes, shapes; of the metadata, the format alone."""
    path = saved(tmp_path / "model.safetensors", a=HALF, b=WHOLE)
    (made,) = stand_ins_of(tmp_path, ["model.safetensors"])
    assert made.name == "model.safetensors"
    assert told(made.data) == told(_head(path))
    assert header(made.data)["__metadata__"] == {"format": "pt"}


def _head(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def test_nobody_gets_a_tensor_from_it(tmp_path: Path) -> None:
    """Neither safetensors, which vLLM uses, nor our own reader."""
    saved(tmp_path / "hf" / "model.safetensors", a=HALF)
    (made,) = stand_ins_of(tmp_path / "hf", [])
    path = tmp_path / made.name
    path.write_bytes(made.data)
    check_stand_in(path)
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass
    with pytest.raises(CorruptError):
        read_safetensors(path)


def test_files_of_one_kind_are_put_together(tmp_path: Path) -> None:
    """vLLM reads all headers, and tells Mistral's files from others by their name."""
    saved(tmp_path / "model-00001-of-00002.safetensors", a=HALF)
    saved(tmp_path / "model-00002-of-00002.safetensors", b=WHOLE)
    saved(tmp_path / "consolidated.safetensors", c=WHOLE)
    made = {one.name: told(one.data) for one in stand_ins_of(tmp_path, [])}
    assert made == {
        "model.safetensors": {"a": ("F16", [4, 2]), "b": ("I32", [3])},
        "consolidated.safetensors": {"c": ("I32", [3])},
    }


def test_a_tensor_in_two_files_is_the_models(tmp_path: Path) -> None:
    """Of the file that is packed, not of one beside it."""
    saved(tmp_path / "model.safetensors", a=HALF)
    saved(tmp_path / "other.safetensors", a=WHOLE.clone(), b=WHOLE)
    (made,) = stand_ins_of(tmp_path, ["model.safetensors"])
    assert told(made.data) == {"b": ("I32", [3]), "a": ("F16", [4, 2])}


def test_only_the_file_that_is_packed_counts(tmp_path: Path) -> None:
    """`pack DIR/model.safetensors` leaves the others out."""
    path = saved(tmp_path / "model.safetensors", a=HALF)
    saved(tmp_path / "other.safetensors", b=WHOLE)
    (made,) = stand_ins_of(path, [])
    assert told(made.data).keys() == {"a"}


def test_dtypes_are_those_that_the_tensors_become(tmp_path: Path) -> None:
    """`pack --dtype`: floating-point ones change, with their lengths."""
    saved(tmp_path / "model.safetensors", a=HALF, b=WHOLE)
    (made,) = stand_ins_of(tmp_path, [], lambda d: "float32" if d == "float16" else d)
    assert told(made.data) == {"a": ("F32", [4, 2]), "b": ("I32", [3])}
    entries = [e for n, e in header(made.data).items() if n != "__metadata__"]
    ends = sorted(e["data_offsets"][1] for e in entries if isinstance(e, dict))
    assert ends[-1] == 4 * 8 + 4 * 3


def test_what_is_no_safetensors_file_is_left_out(tmp_path: Path) -> None:
    """What a git checkout leaves in place of a large file, for example."""
    saved(tmp_path / "model.safetensors", a=HALF)
    (tmp_path / "other.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert [one.name for one in stand_ins_of(tmp_path, [])] == ["model.safetensors"]


def test_a_bundle_without_one_gets_it_from_its_index() -> None:
    """An older bundle, or tensorizer's own: names, dtypes and shapes are there."""
    specs = [TensorSpec("a.weight", "float16", (4, 2)), TensorSpec("b", "float4_e2m1fn_x2", (3, 4))]
    index = plan_file(specs, encrypted=False).index
    made = stand_in_of_index(index, mistral=False)
    assert made is not None
    assert made.name == "model.safetensors"
    assert told(made.data) == {"a.weight": ("F16", [4, 2]), "b": ("F4", [3, 8])}


@pytest.mark.parametrize(
    ("name", "mistral"), [("tok_embeddings.weight", False), ("layers.0.x", True)]
)
def test_a_mistral_bundle_without_one_stays_a_mistral(name: str, mistral: bool) -> None:
    """By its tensors' names, or by a params.json that is alone."""
    index = plan_file([TensorSpec(name, "bfloat16", (2,))], encrypted=False).index
    made = stand_in_of_index(index, mistral=mistral)
    assert made is not None
    assert made.name == "consolidated.safetensors"


def test_vllms_own_parameters_tell_nothing_of_a_checkpoint() -> None:
    """Their names and dtypes are others."""
    specs = [TensorSpec("a", "float16", (4,)), TensorSpec(RANK_MARKER, "uint8", (1,))]
    index = plan_file(specs, encrypted=False).index
    assert stand_in_of_index(index, mistral=False) is None


def test_a_stand_in_with_data_is_refused(tmp_path: Path) -> None:
    """A bundle's weights are in its .tensors files."""
    with pytest.raises(CorruptError, match=r"model\.safetensors .* not a safetensors header alone"):
        check_stand_in(saved(tmp_path / "model.safetensors", a=HALF))
