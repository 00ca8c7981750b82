"""The writer: what it writes, tensorizer's own reader reads, bit for bit."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorizer import CryptographyError, DecryptionParams, TensorDeserializer

from tensors_samples import (
    KEY,
    PASSPHRASE,
    FixedKey,
    MemorySource,
    tensor_bytes,
    write,
)
from tensorserve.bundle.keys import parse_passphrase
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import (
    ITEM_SIZES,
    FileKey,
    FilePlan,
    PasswordHash,
    TensorRecord,
    TensorSpec,
    WrittenDigests,
    fresh_password_hash,
    plan_file,
    read_header,
    read_index,
    read_tensor,
    write_file,
    writer,
)
from tensorserve.format.dtypes import parse_dtype, raw_dtype
from tensorserve.secret import Secret

DTYPES = [
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
    "float16", "bfloat16", "float32", "float64", "complex64",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
CHEAP = PasswordHash(passes=1, memory=8192, salt=bytes(range(16)))
KINDS = ("plain", "key", "passphrase")


def key_of(kind: str) -> FileKey | None:
    if kind == "passphrase":
        return parse_passphrase(Secret(PASSPHRASE))
    return FixedKey() if kind == "key" else None


def planned(tensors: dict[str, torch.Tensor], kind: str) -> FilePlan:
    return plan_file(
        (
            TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in tensors.items()
        ),
        encrypted=kind != "plain",
        derivation=CHEAP if kind == "passphrase" else None,
    )


def written_file(
    tensors: dict[str, torch.Tensor], kind: str, *, threads: int | None = None
) -> tuple[bytes, WrittenDigests]:
    contents = {name: tensor_bytes(tensor) for name, tensor in tensors.items()}

    def read(record: TensorRecord, start: int, buffer: memoryview) -> None:
        buffer[:] = contents[record.name][start : start + len(buffer)]

    class Output(bytearray):
        def write(self, data: bytes | memoryview, /) -> None:
            self.extend(data)

    out = Output()
    made = write_file(out, planned(tensors, kind), read, key=key_of(kind), threads=threads)
    return bytes(out), made


def written(tensors: dict[str, torch.Tensor], kind: str, *, threads: int | None = None) -> bytes:
    return written_file(tensors, kind, threads=threads)[0]


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def noise(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    made = {}
    for dtype in DTYPES:
        values = noise(15 * ITEM_SIZES[dtype])
        if dtype == "bool":
            values = values % 2
        made[f"layer.{dtype}"] = values.view(getattr(torch, dtype)).reshape(3, 5)
    made["scalar"] = torch.tensor(3.5)
    made["chunks"] = noise(9 * 1024**2 + 7)
    made["exact"] = noise(2 * 1024**2)
    made["empty"] = torch.empty(0, 4)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_tensorizer_reads_what_is_written(tmp_path: Path, kind: str) -> None:
    """Bit for bit, hashes verified, for every dtype, every way to seal, and an empty tensor."""
    tensors = samples()
    path = tmp_path / "model.tensors"
    path.write_bytes(written(tensors, kind))
    parameters = {
        "plain": None,
        "key": DecryptionParams.from_key(KEY),
        "passphrase": DecryptionParams.from_string(PASSPHRASE),
    }[kind]
    with TensorDeserializer(path, device="cpu", encryption=parameters, verify_hash=True) as found:
        assert list(found.keys()) == list(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert tensor_bytes(found[name]) == tensor_bytes(tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_our_reader_reads_what_is_written(kind: str) -> None:
    """Names, dtypes, shapes and bytes, all digests verified."""
    tensors = samples()
    data, digests = written_file(tensors, kind)
    source = MemorySource(data)
    index = read_index(source)
    assert [record.name for record in index.tensors] == list(tensors)
    for record, digest in zip(index.tensors, digests.tensors, strict=True):
        assert record.dtype == str(tensors[record.name].dtype).removeprefix("torch.")
        assert record.shape == tuple(tensors[record.name].shape)
        read = read_tensor(source, record, index, key_of(kind), expected=digest)
        assert read == tensor_bytes(tensors[record.name]), record.name
        with pytest.raises(CorruptError, match="does not have the sha256 that the manifest gives"):
            read_tensor(source, record, index, key_of(kind), expected=bytes(32))


@pytest.mark.parametrize("kind", ["key", "passphrase"])
def test_an_encrypted_file_tells_nothing_of_its_plaintext(kind: str) -> None:
    """No digest of it, by which anybody would know a tensor that he has: not in any header."""
    tensors = samples()
    data, digests = written_file(tensors, kind)
    source = MemorySource(data)
    index = read_index(source)
    for record, digest in zip(index.tensors, digests.tensors, strict=True):
        header = read_header(source, record, index)
        assert header.hashes == ()
        plaintext = tensor_bytes(tensors[record.name])
        assert digest == hashlib.sha256(header.hashed + plaintext).digest()
        for trace in (digest, hashlib.sha256(plaintext).digest()):
            assert trace not in data
        with pytest.raises(CorruptError, match="is sealed, but neither"):
            read_tensor(source, record, index, key_of(kind))


def test_tensorizer_finds_no_fault_where_there_is_no_digest(tmp_path: Path) -> None:
    """`verify_hash` and `verify_module` have nothing to compare and pass; the tags still count."""
    module = torch.nn.Linear(3, 2)
    path = tmp_path / "model.tensors"
    data = bytearray(written(dict(module.state_dict()), "key"))
    path.write_bytes(data)
    encryption = DecryptionParams.from_key(KEY)
    with TensorDeserializer(path, device="cpu", encryption=encryption, verify_hash=True) as found:
        into = torch.nn.Linear(3, 2)
        into.load_state_dict(dict(found))
        assert found.verify_module(into)[0]
        into.weight.data.zero_()
        assert found.verify_module(into)[0], "it cannot know"
    data[-9] ^= 1  # in front of the eight bytes at the end
    path.write_bytes(data)
    with (
        pytest.raises(CryptographyError),
        TensorDeserializer(path, device="cpu", encryption=encryption) as found,
    ):
        dict(found)


def test_a_plain_file_is_tensorizers_own_behind_the_index() -> None:
    """Headers hold no offsets, so with the same tensors they must be the same bytes."""
    tensors = samples()
    ours, theirs = written(tensors, "plain"), write(tensors)
    our_index, their_index = (read_index(MemorySource(data)) for data in (ours, theirs))
    assert our_index.file_version == their_index.file_version
    assert (
        ours[our_index.tensors[0].header_offset :] == theirs[their_index.tensors[0].header_offset :]
    )
    assert ours[:57] == theirs[:57]  # magic, version, flags, size of the data


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_data_version_is_tensorizers(dtype: str) -> None:
    """The lowest that older readers need: 1 for numpy's dtypes, 2 for others."""
    tensors = {"a": torch.ones(3, dtype=getattr(torch, dtype))}
    assert written(tensors, "plain")[5:9] == write(tensors)[5:9]


def test_the_plan_foretells_the_file() -> None:
    """Size and digest are known before the first byte, for the disk check and the manifest."""
    tensors = samples()
    data = written(tensors, "key")
    index = planned(tensors, "key").index
    assert index.size == len(data)
    assert index == read_index(MemorySource(data))


def test_an_index_beyond_256_kib_is_written_and_read(tmp_path: Path) -> None:
    """tensorizer's reserve is no limit: mixture-of-experts models have tens of thousands."""
    tensors = {
        f"model.layers.{i}.mlp.experts.{i}.down_proj.weight": torch.tensor([i]) for i in range(5000)
    }
    data = written(tensors, "key")
    assert read_index(MemorySource(data)).tensors[0].header_offset > 256 * 1024
    path = tmp_path / "many.tensors"
    path.write_bytes(data)
    with TensorDeserializer(
        path, device="cpu", encryption=DecryptionParams.from_key(KEY), num_readers=1
    ) as found:
        assert len(found) == 5000
        assert found["model.layers.4999.mlp.experts.4999.down_proj.weight"].item() == 4999


def test_no_nonce_is_used_twice() -> None:
    """Two chunks under one nonce would give away their difference."""
    nonces = []
    for _ in range(2):  # two files under one key as well
        source = MemorySource(written(samples(), "key"))
        index = read_index(source)
        for record in index.tensors:
            chunks = read_header(source, record, index).chunks
            if record.length:
                assert chunks is not None
                nonces += [chunks.chunk_nonce(i) for i in range(chunks.count)]
    assert len(nonces) > 2 * len(DTYPES)
    assert len(nonces) == len(set(nonces))


def test_a_fresh_derivation_is_tensorizers_default_with_own_salt() -> None:
    """The moderate preset, as EncryptionParams.from_string takes it."""
    from tensorizer import EncryptionParams

    one, other = fresh_password_hash(), fresh_password_hash()
    assert one.passes == EncryptionParams.OpsLimit.MODERATE
    assert one.memory == EncryptionParams.MemLimit.MODERATE
    assert len(one.salt) == 16
    assert one.salt != other.salt


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        ([], "0 tensors"),
        ([TensorSpec("a", "int8", (1,)), TensorSpec("a", "int8", (1,))], "'a'"),
        ([TensorSpec("", "int8", (1,))], "''"),
        ([TensorSpec("\x1e[1]", "int8", (1,))], "path"),
        ([TensorSpec("\ud800", "int8", (1,))], "name"),
        ([TensorSpec("x" * 70000, "int8", (1,))], "70000"),
        ([TensorSpec("a", "int8", (1,) * 256)], "256"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(specs: list[TensorSpec], named: str) -> None:
    """Before a byte is written, and by name."""
    with pytest.raises(ConfigurationError, match=named):
        plan_file(specs, encrypted=False)


@pytest.mark.parametrize("encrypted", [False, True])
def test_dimensions_beyond_32_bits_take_the_long_form(encrypted: bool) -> None:
    """Version 5 with a version in each entry; what tensorizer's own parser makes of the index."""
    import io

    from tensorizer.serialization import _FileHeader, _MetadataDeserializer

    long = (2**32 + 1, 0)
    plan = plan_file(
        [TensorSpec("long", "int8", long), TensorSpec("a", "int8", (1,))], encrypted=encrypted
    )
    stream = io.BytesIO(plan.prologue)
    assert stream.read(5) == b"|TZR|"
    header = _FileHeader.from_io(stream, accepted_versions=(5,))
    assert int(header.feature_flags) == (3 if encrypted else 2)
    entries, _, _ = _MetadataDeserializer.from_io(stream, 2, True, (1, 5))
    assert [(tuple(e.shape), e.metadata_version) for e in entries.values()] == [
        (long, 5),
        ((1,), 1),
    ]


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_every_dtype_that_can_be_read_can_be_written(dtype: str) -> None:
    """The two tables are each other's inverse."""
    if dtype == "complex128":
        assert raw_dtype(dtype) == b"<c16"
    assert parse_dtype(raw_dtype(dtype)).name == dtype


def test_an_error_in_the_middle_ends_the_writing() -> None:
    """It surfaces as it was raised, threads at rest."""

    def read(record: TensorRecord, start: int, buffer: memoryview) -> None:  # noqa: ARG001
        if start:
            raise OSError("the disk is gone")

    class Output:
        def write(self, data: bytes | memoryview, /) -> None: ...

    plan = plan_file([TensorSpec("a", "uint8", (20 * 1024**2,))], encrypted=True)
    with pytest.raises(OSError, match="the disk is gone"):
        write_file(Output(), plan, read, key=FixedKey())


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_threads_encrypt_than_were_allowed(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `pack --serialization-kwargs '{"limit_cpu_concurrency": N}'` comes down to."""
    at_once, most, lock = 0, 0, threading.Lock()
    seal = writer.seal_chunk

    def counted(key: bytes, nonce: bytes, plaintext: memoryview, out: memoryview) -> bytes:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.005)
        tag = seal(key, nonce, plaintext, out)
        with lock:
            at_once -= 1
        return tag

    monkeypatch.setattr(writer, "seal_chunk", counted)
    # As many at a time as three of the largest take, one of them a long one here.
    content = {"long": torch.zeros(6 * 1024**2, dtype=torch.uint8)}
    content |= {f"t{n}": torch.zeros(2 * 1024**2, dtype=torch.uint8) for n in range(12)}
    written(content, "key", threads=threads)
    assert most == threads
