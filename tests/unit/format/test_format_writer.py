"""The writer: what it writes, tensorizer's own reader reads, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorizer import DecryptionParams, TensorDeserializer
from tensors_samples import FixedKey, MemorySource

from tensorserve.errors import ConfigurationError
from tensorserve.format import (
    PasswordHash,
    Sealing,
    TensorSpec,
    derive_key,
    lay_out,
    read_index,
    read_tensor,
    write_tensors,
)

KEY = bytes(range(32))
DTYPES = [
    "float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "int8", "uint8", "int16", "int32", "int64", "bool", "complex64",
]  # fmt: skip
DERIVATION = PasswordHash(passes=1, memory=8192, salt=bytes(16))
SEALINGS = {
    "plain": None,
    "key": Sealing(KEY),
    "passphrase": Sealing(
        derive_key(b"open sesame", salt=DERIVATION.salt, passes=1, memory=8192), DERIVATION
    ),
}


def data_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def written(tensors: dict[str, torch.Tensor], sealing: Sealing | None) -> bytes:
    specs = [
        TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in tensors.items()
    ]
    layout = lay_out(specs, sealing)
    out = bytearray()
    write_tensors(layout, out.extend, lambda spec: data_of(tensors[spec.name]), sealing)
    assert len(out) == layout.size
    assert read_index(MemorySource(bytes(out))).digest == layout.index_digest
    return bytes(out)


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {
        f"layer.{dtype}": torch.randint(0, 2, (3, 5), generator=generator).to(getattr(torch, dtype))
        for dtype in DTYPES
    }
    made["scalar"] = torch.tensor(3.5)
    made["chunks"] = torch.randint(
        0, 256, (5 * 1024**2 + 7,), dtype=torch.uint8, generator=generator
    )
    made["exact"] = torch.zeros(2 * 1024**2, dtype=torch.uint8)
    return made


@pytest.mark.parametrize("kind", SEALINGS)
def test_tensorizer_reads_what_is_written(tmp_path: Path, kind: str) -> None:
    """Bit for bit, hashes verified, for every dtype and every way to seal."""
    tensors = samples()
    path = tmp_path / "model.tensors"
    path.write_bytes(written(tensors, SEALINGS[kind]))
    parameters = {
        "plain": None,
        "key": DecryptionParams.from_key(KEY),
        "passphrase": DecryptionParams.from_string("open sesame"),
    }[kind]
    with TensorDeserializer(path, device="cpu", encryption=parameters, verify_hash=True) as found:
        assert list(found.keys()) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert bytes(data_of(found[name].data)) == bytes(data_of(tensor)), name


@pytest.mark.parametrize("kind", SEALINGS)
def test_our_reader_reads_what_is_written(kind: str) -> None:
    """Also a tensor without elements, which tensorizer's encrypting writer cannot store."""
    tensors = samples() | {"empty": torch.empty(0, 4)}
    source = MemorySource(written(tensors, SEALINGS[kind]))
    index = read_index(source)
    sealing = SEALINGS[kind]
    key = FixedKey(sealing.key) if sealing else None
    for record in index.tensors:
        assert bytes(read_tensor(source, record, index, key)) == bytes(
            data_of(tensors[record.name])
        )


def test_an_index_beyond_256_kib_is_written_and_read(tmp_path: Path) -> None:
    """tensorizer's reserve is no limit: mixture-of-experts models have tens of thousands."""
    tensors = {
        f"model.layers.{i}.mlp.experts.{i}.down_proj.weight": torch.tensor([i]) for i in range(6000)
    }
    data = written(tensors, Sealing(KEY))
    source = MemorySource(data)
    index = read_index(source)
    assert index.tensors[0].header_offset > 256 * 1024
    path = tmp_path / "many.tensors"
    path.write_bytes(data)
    with TensorDeserializer(
        path, device="cpu", encryption=DecryptionParams.from_key(KEY), lazy_load=True
    ) as found:
        name = "model.layers.5999.mlp.experts.5999.down_proj.weight"
        assert found[name].item() == 5999


def test_no_nonce_is_used_twice() -> None:
    """Two chunks under one nonce would give away their difference."""
    source = MemorySource(written(samples(), Sealing(KEY)))
    from tensorserve.format import read_header

    index = read_index(source)
    nonces = []
    for record in index.tensors:
        chunks = read_header(source, record, index).chunks
        assert chunks is not None
        nonces += [chunks.chunk_nonce(i) for i in range(chunks.count)]
    assert len(nonces) == len(set(nonces))


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [TensorSpec("a", "int8", (1,)), TensorSpec("a", "int8", (1,))],
        [TensorSpec("", "int8", (1,))],
        [TensorSpec("x" * 70000, "int8", (1,))],
    ],
)
def test_what_the_format_cannot_hold_is_refused(specs: list[TensorSpec]) -> None:
    """Before a byte is written."""
    with pytest.raises(ConfigurationError):
        lay_out(specs, None)


def test_dimensions_beyond_32_bits_take_the_long_form() -> None:
    """Version 5, with a version for each entry; only laid out here."""
    layout = lay_out([TensorSpec("long", "int8", (2**32, 0)), TensorSpec("a", "int8", (1,))], None)
    assert layout.versioned
    assert layout.prologue[5] == 5
