"""Do we read what tensorizer writes, bit for bit?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tensors_samples import (
    KEY,
    PASSPHRASE,
    Entry,
    FixedKey,
    MemorySource,
    encryption,
    lying_file,
    tensor_bytes,
    tensorizer_reads,
    we_read,
    write,
)
from tensorserve.bundle.keys import parse_passphrase
from tensorserve.format import (
    KIND_BUFFER,
    KIND_PARAMETER,
    KIND_STATE_DICT,
    FileKey,
    read_header,
    read_index,
    read_tensor,
)
from tensorserve.secret import Secret

SEALINGS = ("plain", "key", "passphrase")
DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    width = torch.empty((), dtype=dtype).element_size()
    top = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, top, (*shape[:-1], shape[-1] * width), dtype=torch.uint8)
    return raw.view(dtype)


def _content() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        **{name: _random(getattr(torch, name), 5, 7) for name in DTYPES},
        "scalar": torch.tensor(3.25),
        "scalar_bf16": torch.tensor(-1.5, dtype=torch.bfloat16),
        "transposed": _random(torch.int32, 3, 9).t(),
        "one_chunk_exactly": _random(torch.uint8, 2 * 1024 * 1024),
        "one_byte_more": _random(torch.uint8, 2 * 1024 * 1024 + 1),
        "many_chunks": _random(torch.bfloat16, 5, 523_001),
    }


CONTENT = _content()


def _key(kind: str) -> FileKey | None:
    if kind == "plain":
        return None
    return FixedKey(KEY) if kind == "key" else parse_passphrase(Secret(PASSPHRASE, "the test"))


@pytest.fixture(scope="module", params=SEALINGS)
def sample(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """One file for each way of sealing: what we read of it, and what tensorizer reads of it."""
    data = write(CONTENT, encryption(request.param))
    return we_read(data, _key(request.param)), tensorizer_reads(data, request.param)


@pytest.mark.parametrize("name", CONTENT)
def test_a_tensor_is_read_bit_for_bit(
    name: str, sample: tuple[dict[str, Any], Mapping[str, Any]]
) -> None:
    """Dtype, shape and bytes are those that were written, and those that tensorizer reads."""
    ours, theirs = sample
    written = CONTENT[name]

    assert ours[name][1:] == (
        str(written.dtype).removeprefix("torch."),
        tuple(written.shape),
        tensor_bytes(written),
    )
    assert theirs[name].dtype == written.dtype
    assert tensor_bytes(theirs[name]) == ours[name][3]


def test_tensors_come_in_the_order_of_the_file(
    sample: tuple[dict[str, Any], Mapping[str, Any]],
) -> None:
    """The index keeps the order that the state dict had."""
    assert list(sample[0]) == list(CONTENT)


@pytest.mark.parametrize(("kind", "version"), [("plain", 2), ("key", 3), ("passphrase", 3)])
def test_the_index_says_whether_the_file_is_encrypted(kind: str, version: int) -> None:
    """Up to data version 3 the version alone tells."""
    index = read_index(MemorySource(write({"x": CONTENT["bfloat16"]}, encryption(kind))))

    assert (index.file_version, index.encrypted) == (version, kind != "plain")


def test_a_file_without_opaque_dtypes_is_of_version_1() -> None:
    """The oldest version is what tensorizer still writes where it can."""
    index = read_index(MemorySource(write({"x": CONTENT["float32"]})))

    assert index.file_version == 1


@pytest.mark.parametrize("kind", SEALINGS)
def test_a_meta_tensor_has_a_shape_and_no_data(kind: str) -> None:
    """Meta tensors (data version 4) are told apart, also in encrypted files."""
    content = {
        "before": CONTENT["int8"],
        "meta": torch.empty((3, 5), dtype=torch.bfloat16, device="meta"),
        "after": CONTENT["float16"],
    }
    data = write(content, encryption(kind))
    index = read_index(MemorySource(data))
    meta = index.tensors[1]

    assert (index.file_version, index.encrypted) == (4, kind != "plain")
    assert (meta.is_meta, meta.shape, meta.length) == (True, (3, 5), 0)
    assert we_read(data, _key(kind))["after"][3] == tensor_bytes(content["after"])


@pytest.mark.parametrize("kind", SEALINGS)
def test_long_shapes_are_read(kind: str) -> None:
    """Dimensions of 2^32 and more (data version 5) take 8 bytes, beside entries of 4."""
    content = {
        "short": CONTENT["int8"],
        "long": torch.empty((2**32 + 1, 2), dtype=torch.float16, device="meta"),
        "after": CONTENT["bfloat16"],
    }
    data = write(content, encryption(kind))
    index = read_index(MemorySource(data))

    assert index.file_version == 5
    assert [record.shape for record in index.tensors] == [(5, 7), (2**32 + 1, 2), (5, 7)]
    assert we_read(data, _key(kind))["after"][3] == tensor_bytes(content["after"])


def test_an_empty_tensor_is_not_a_meta_tensor() -> None:
    """A zero among the dimensions leaves nothing to fill."""
    data = write({"empty": torch.empty((0, 4)), "x": CONTENT["int8"]})
    empty = read_index(MemorySource(data)).tensors[0]

    assert (empty.is_meta, empty.shape, empty.length) == (False, (0, 4), 0)
    assert we_read(data)["empty"][3] == b""


@pytest.mark.parametrize("kind", SEALINGS)
def test_paths_of_nested_state_dicts_become_dotted_names(kind: str) -> None:
    """Keys and list indices are joined by dots, in depth-first order."""
    tensors = [torch.full((3,), float(i)) for i in range(4)]
    content = {
        "model": {"layers": [{"weight": tensors[0]}, {"weight": tensors[1], "büros": tensors[2]}]},
        "lm_head.weight": tensors[3],
    }

    ours = we_read(write(content, encryption(kind)), _key(kind))

    assert list(ours) == [
        "model.layers.0.weight",
        "model.layers.1.weight",
        "model.layers.1.büros",
        "lm_head.weight",
    ]
    assert [entry[3] for entry in ours.values()] == [tensor_bytes(t) for t in tensors]
    assert {entry[0] for entry in ours.values()} == {KIND_STATE_DICT}


def test_a_list_of_tensors_is_named_by_its_indices() -> None:
    """tensorizer accepts a bare list as a state dict."""
    assert list(we_read(write([torch.ones(2), torch.zeros(2)]))) == ["0", "1"]


@pytest.mark.parametrize("kind", SEALINGS)
def test_a_module_keeps_parameters_apart_from_buffers(kind: str) -> None:
    """write_module() says which is which, and puts a dot before the root module's own names."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    module.register_buffer("steps", torch.tensor(7))

    ours = we_read(write(module, encryption(kind)), _key(kind))

    assert ours[".steps"][0] == KIND_BUFFER
    assert ours["0.weight"][0] == KIND_PARAMETER
    assert ours["1.running_mean"][0] == KIND_BUFFER
    assert ours["0.weight"][3] == tensor_bytes(module[0].weight)


def test_header_and_data_are_contiguous_and_fill_the_file() -> None:
    """A plan may cut the file after the index into ranges without gaps."""
    data = write(CONTENT, encryption("key"))
    index = read_index(MemorySource(data))
    offset = 73 + 256 * 1024

    for record in index.tensors:
        assert record.header_offset == offset
        assert record.header_offset < record.data_offset <= record.end
        offset = record.end
    assert offset + 8 == index.size == len(data)
    assert index.data_bytes == sum(map(len, map(tensor_bytes, CONTENT.values())))


def test_the_index_of_a_tensorizer_file_takes_one_read() -> None:
    """Each read of a remote source is a round trip."""
    source = MemorySource(write({"x": CONTENT["int8"]}))

    read_index(source)

    assert source.reads == [(0, 73 + 256 * 1024)]


def test_a_larger_index_takes_a_second_read() -> None:
    """Only the missing bytes are read again."""
    source = MemorySource(lying_file(Entry(), padding=bytes(300 * 1024)))
    first = 73 + 256 * 1024
    end = source.size - 80 - 16 - 8

    read_index(source)

    assert source.reads == [(0, first), (first, end - first)]


def test_the_chunks_of_a_tensor_cover_it() -> None:
    """Chunks of 2 MiB each, the last one short; each has its tag and its own nonce."""
    source = MemorySource(write({"x": CONTENT["many_chunks"]}, encryption("key")))
    index = read_index(source)
    record = index.tensors[0]

    chunks = read_header(source, record, index).chunks

    assert chunks is not None
    bounds = [chunks.chunk_bounds(i, record.length) for i in range(chunks.count)]
    assert bounds == [(0, 2**21), (2**21, 2**22), (2**22, record.length)]
    assert len({chunks.chunk_nonce(i) for i in range(3)}) == 3
    assert all(len(chunks.chunk_tag(i)) == 16 for i in range(3))
    with pytest.raises(IndexError):
        chunks.chunk_bounds(3, record.length)


def test_one_tag_seals_a_tensor_whole_whatever_the_chunk_size() -> None:
    """tensorizer takes a single tag so, and so do we: chunk_size has no meaning then."""
    source = MemorySource(write({"x": CONTENT["uint8"]}, encryption("key")))
    index = read_index(source)

    chunks = read_header(source, index.tensors[0], index).chunks

    assert chunks is not None
    assert chunks.chunk_bounds(0, 10 * 2**21) == (0, 10 * 2**21)


def test_a_meta_tensor_reads_as_no_bytes() -> None:
    """Nothing is allocated for a shape that no data stands behind."""
    source = MemorySource(write({"m": torch.empty(2**32, device="meta")}))
    index = read_index(source)

    assert read_tensor(source, index.tensors[0], index, None) == b""
