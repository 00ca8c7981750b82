"""Which safetensors files count: those that the installed vLLM's own loader takes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorizer import TensorDeserializer

from hf_samples import ACCESS, make_model, make_sharded, tensors
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError
from tensorserve.packing.checkpoint import read_checkpoint
from tensorserve.packing.pack import pack
from tensorserve.packing.weight_files import find_weights

INDEX = "model.safetensors.index.json"


def weight(name: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2)}


def write(directory: Path, *names: str) -> None:
    """One tensor in each, called after its file."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weight(name.replace("/", ".")), path)


def write_index(directory: Path, weight_map: object, name: str = INDEX) -> None:
    (directory / name).write_text(json.dumps({"weight_map": weight_map}))


def two_files(d: Path) -> None:
    write(d, "model.safetensors", "model-extra.safetensors")


def index_and_single(d: Path) -> None:
    write(d, "model.safetensors", "a-1.safetensors", "a-2.safetensors")
    write_index(d, {"x": "a-1.safetensors", "y": "a-2.safetensors"})


def index_of_mistrals_is_not_asked(d: Path) -> None:
    write(d, "model.safetensors", "b.safetensors")
    write_index(d, {"x": "b.safetensors"}, "consolidated.safetensors.index.json")


def index_names_more(d: Path) -> None:
    write(d, "a.safetensors", "b.safetensors")
    write_index(d, {"x": "a.safetensors", "not-there": "b.safetensors"})


def numbered(d: Path) -> None:
    write(d, *(f"model-{number}.safetensors" for number in (10, 9, 1)))


def hidden_and_upper_case(d: Path) -> None:
    write(d, "a.safetensors", ".hidden.safetensors", "B.SAFETENSORS")


def below(d: Path) -> None:
    write(d, "a.safetensors", "1_Dense/model.safetensors", "original/x.safetensors")


def both_layouts(d: Path) -> None:
    write(d, "model-1.safetensors", "consolidated.safetensors", "consolidated-2.safetensors")
    write_index(d, {"x": "model-1.safetensors"})


def mistrals_index(d: Path) -> None:
    write(d, "consolidated-1.safetensors", "consolidated-2.safetensors", "other.safetensors")
    write_index(d, {"x": "consolidated-2.safetensors"}, "consolidated.safetensors.index.json")


def linked(d: Path) -> None:
    write(d.parent / "blobs", "0123.safetensors")
    (d / "model.safetensors").symlink_to("../blobs/0123.safetensors")


def pickles_beside(d: Path) -> None:
    write(d, "a.safetensors")
    (d / "pytorch_model.bin").write_bytes(b"")


def index_as_directory(d: Path) -> None:
    write(d, "a.safetensors")
    (d / INDEX).mkdir()


SERVED = [
    two_files, index_and_single, index_of_mistrals_is_not_asked, index_names_more, numbered,
    hidden_and_upper_case, below, both_layouts, mistrals_index, linked, pickles_beside,
    index_as_directory,
]  # fmt: skip


def missing_file(d: Path) -> None:
    write(d, "a.safetensors")
    write_index(d, {"x": "a.safetensors", "y": "b.safetensors"})


def file_in_a_folder(d: Path) -> None:
    write(d, "a.safetensors", "sub/b.safetensors")
    write_index(d, {"x": "a.safetensors", "y": "sub/b.safetensors"})


def dotted(d: Path) -> None:
    write(d, "a.safetensors")
    write_index(d, {"x": "./a.safetensors"})


def outside(d: Path) -> None:
    write(d, "a.safetensors")
    write(d.parent, "b.safetensors")
    write_index(d, {"x": "a.safetensors", "y": "../b.safetensors"})


def absolute(d: Path) -> None:
    write(d, "a.safetensors")
    write_index(d, {"x": "/etc/passwd"})


def empty_index(d: Path) -> None:
    write(d, "a.safetensors")
    write_index(d, {})


def no_index(d: Path) -> None:
    write(d, "a.safetensors")
    (d / INDEX).write_text("<html>")


def marked_index(d: Path) -> None:
    """UTF-8 with a byte order mark, which Python's json refuses."""
    write(d, "a.safetensors")
    (d / INDEX).write_text("\ufeff" + json.dumps({"weight_map": {"x": "a.safetensors"}}))


def numbers_in_index(d: Path) -> None:
    write(d, "a.safetensors")
    write_index(d, {"x": 1})


def mistrals_below(d: Path) -> None:
    write(d, "a.safetensors", "original/consolidated.safetensors")


def none(d: Path) -> None:
    (d / "model.GGUF").write_bytes(b"")


def upper_case_alone(d: Path) -> None:
    write(d, "MODEL.SAFETENSORS")


REFUSED = [
    missing_file, file_in_a_folder, dotted, outside, absolute, empty_index, no_index, marked_index,
    numbers_in_index, mistrals_below, none, upper_case_alone,
]  # fmt: skip


def of_vllm(directory: Path) -> list[str]:
    """What the installed vLLM's loader would read, in its order."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import weight_utils
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig())
    _, files, safetensors, _ = loader._prepare_weights(str(directory), None, None, True, None)
    assert safetensors
    return [Path(file).name for file in sorted(files, key=weight_utils._natural_sort_key)]


@pytest.mark.parametrize("make", SERVED, ids=lambda make: make.__name__)
def test_the_same_files_count_as_in_vllm(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """The same ones, in the same order."""
    directory = tmp_path / "m"
    directory.mkdir()
    make(directory)
    found = [path.name for path in find_weights(directory).paths]
    assert found == of_vllm(directory)


def sharded_with_too_long_an_index(d: Path) -> None:
    make_sharded(d)
    index = json.loads((d / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    (d / INDEX).write_text(json.dumps(index))


def two_files_of_one_model(d: Path) -> None:
    make_twice(d, torch.ones(16), index=False)


def a_shard_that_has_more_than_its_index_says(d: Path) -> None:
    make_sharded(d)
    index = json.loads((d / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (d / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "make",
    [
        sharded_with_too_long_an_index,
        two_files_of_one_model,
        a_shard_that_has_more_than_its_index_says,
    ],
    ids=lambda make: make.__name__,
)
def test_a_bundle_has_what_vllm_would_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Names, dtypes and bytes, as the iterator of the installed vLLM's loader gives them."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    source = tmp_path / "hf"
    make(source)
    loader = DefaultModelLoader(LoadConfig(use_tqdm_on_load=False))
    wanted = dict(
        loader._get_weights_iterator(DefaultModelLoader.Source(str(source), revision=None))
    )
    pack(source, str(tmp_path / "b"), access=ACCESS)
    with TensorDeserializer(tmp_path / "b" / "model.tensors", device="cpu") as found:
        assert set(found) == set(wanted)
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].data.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_vllm_refuses_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """With one of our own errors, and words that name the directory."""
    directory = tmp_path / "m"
    directory.mkdir()
    make(directory)
    with pytest.raises((RuntimeError, OSError, ValueError, TypeError, KeyError)):
        of_vllm(directory)
    with pytest.raises((ConfigurationError, CorruptError), match=str(tmp_path)):
        find_weights(directory)


def test_a_second_file_without_an_index_is_packed(tmp_path: Path) -> None:
    """All of both, and nothing is left out."""
    source, content = make_model(tmp_path / "hf"), tensors()
    rest = {"model.norm.weight": content.pop("model.norm.weight")}
    save_file(content, source / "model.safetensors")
    save_file(rest, source / "model-extra.safetensors")
    result = pack(source, str(tmp_path / "b"), access=ACCESS)
    with TensorDeserializer(tmp_path / "b" / "model.tensors", device="cpu") as found:
        assert set(found) == set(tensors())
    assert not [name for name in result.left_out if name.endswith(".safetensors")]
    checkpoint = read_checkpoint(source)
    assert checkpoint.weight_files == ("model-extra.safetensors", "model.safetensors")


def test_what_the_index_does_not_name_is_left_out(tmp_path: Path) -> None:
    """And said, with the reason."""
    source = make_sharded(tmp_path / "hf")
    write(source, "model.safetensors", "1_Dense/model.safetensors")
    result = pack(source, str(tmp_path / "b"), access=ACCESS)
    assert {"model.safetensors", "1_Dense/model.safetensors"} <= set(result.left_out)
    assert "model.safetensors (not among the model's weight files)" in str(result)


def test_a_tensor_that_only_the_index_has_is_no_error(tmp_path: Path) -> None:
    """vLLM holds no file to its index; the terminal says so."""
    source = make_sharded(tmp_path / "hf")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    result = pack(source, str(tmp_path / "b"), access=ACCESS)
    assert result.tensors == len(tensors())
    assert "lm_head.weight" in str(result)


# A tensor that is there twice ---------------------------------------------------------------------


def make_twice(directory: Path, second: torch.Tensor, *, index: bool) -> Path:
    source = make_model(directory)
    (source / "model.safetensors").rename(source / "a.safetensors")
    save_file(
        {"model.norm.weight": second, "lm_head.weight": torch.ones(3)}, source / "b.safetensors"
    )
    if index:
        owner = dict.fromkeys(tensors(), "a.safetensors") | {"lm_head.weight": "b.safetensors"}
        write_index(source, owner)
    return source


@pytest.mark.parametrize("index", [False, True], ids=["no index", "index"])
@pytest.mark.parametrize(
    "second",
    [torch.zeros(16), torch.ones(15), torch.ones(16, dtype=torch.float16)],
    ids=["values", "shape", "dtype"],
)
def test_a_tensor_that_is_twice_and_differs_is_refused(
    tmp_path: Path, second: torch.Tensor, index: bool
) -> None:
    """vLLM would load both, the index or not: which one stays is an accident."""
    source = make_twice(tmp_path / "hf", second, index=index)
    with pytest.raises(CorruptError, match=r"a\.safetensors and in b\.safetensors, and they dif"):
        pack(source, str(tmp_path / "b"), access=ACCESS)


@pytest.mark.parametrize("index", [False, True], ids=["no index", "index"])
def test_a_tensor_that_is_twice_the_same_is_packed_once(tmp_path: Path, index: bool) -> None:
    """As where embeddings are tied and both shards have them."""
    source = make_twice(tmp_path / "hf", torch.ones(16), index=index)
    pack(source, str(tmp_path / "b"), access=ACCESS)
    with TensorDeserializer(tmp_path / "b" / "model.tensors", device="cpu") as found:
        assert set(found) == {*tensors(), "lm_head.weight"}
        assert torch.equal(found["model.norm.weight"].data, torch.ones(16))


# Links, and what is no file -----------------------------------------------------------------------


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("../blobs/0123"), r"a link to \.\./blobs/0123"),
        (lambda path: path.symlink_to(path.name), r"a link to model\.safetensors"),
        (os.mkfifo, "a pipe"),
        (as_socket, "a socket"),
        (Path.mkdir, "a directory"),
    ],
    ids=["dangling", "circle", "pipe", "socket", "directory"],
)
def test_weights_that_are_no_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], words: str
) -> None:
    """The link, and what it leads to. Nothing waits for a pipe's writer."""
    source = make_model(tmp_path / "hf")
    (source / "model.safetensors").unlink()
    monkeypatch.chdir(source)  # a socket's name is short
    make(source / "model.safetensors")
    with pytest.raises(CorruptError, match=rf"model\.safetensors is {words}"):
        pack(source, str(tmp_path / "b"), access=ACCESS)
    assert not (tmp_path / "b").exists()


def test_an_index_that_is_a_dangling_link_is_named(tmp_path: Path) -> None:
    """vLLM would pass over it and read every file there is."""
    source = make_sharded(tmp_path / "hf")
    (source / INDEX).unlink()
    (source / INDEX).symlink_to("gone")
    with pytest.raises(CorruptError, match=r"index\.json is a link to gone"):
        read_checkpoint(source)


def test_a_place_holder_of_git_lfs_is_named(tmp_path: Path) -> None:
    """What `git clone` leaves without LFS."""
    source = make_model(tmp_path / "hf")
    (source / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(CorruptError, match="Git LFS") as caught:
        read_checkpoint(source)
    assert "git lfs pull" in str(caught.value)


def test_a_source_that_is_a_dangling_link_is_named(tmp_path: Path) -> None:
    """With what it leads to."""
    (tmp_path / "m").symlink_to("elsewhere")
    with pytest.raises(TensorserveError, match="m is a link to elsewhere"):
        read_checkpoint(tmp_path / "m")
