"""Attack: by somebody who has the model's key and can write the bucket, but cannot sign.

A server that was broken into, say. He can make other weights with the same tags: Poly1305 binds
only those who do not have the key. So the signed manifest's tags do not hold him, and the digests
in it do.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import libnacl
import pytest
import torch
from forging import index_of
from loads import load
from victims import KEY, LAYERS, make_adapter, make_bundle, make_source

from model_signers import Pair, make_pair
from tensorserve.bundle.adapter_fit import BaseModel
from tensorserve.bundle.adapter_identity import AdapterIdentity
from tensorserve.config.settings import Settings
from tensorserve.engine.adapters.refusal import AdapterRefused
from tensorserve.engine.adapters.source import AdapterSource
from tensorserve.errors import CorruptError
from tensorserve.format.read_tensor import read_header
from tensorserve.packing.pack import pack
from tensorserve.packing.pack_adapter import pack_adapter
from tensorserve.secret import Secret
from tensorserve.sources import Access
from tensorserve.sources.local import LocalSource

P = 2**130 - 5
CLAMP = 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def signed_bundle(owner: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's; not touched."""
    return make_bundle(tmp_path_factory.mktemp("signed"), signer=owner.signer)


@pytest.fixture
def bundle(signed_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(signed_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def keystream(nonce: bytes, length: int) -> bytes:
    """XSalsa20 (libsodium): 32 bytes for the tag's key, then for the data."""
    out = ctypes.create_string_buffer(32 + length)
    wanted = ctypes.c_ulonglong(32 + length)
    assert libnacl.nacl.crypto_stream(out, wanted, nonce, KEY) == 0
    return out.raw[: 32 + length]


def poly1305(stream: bytes, blocks: list[bytes]) -> tuple[int, int]:
    """(sum before s is added, r) over whole blocks of 16 bytes (RFC 8439)."""
    r = int.from_bytes(stream[:16], "little") & CLAMP
    total = 0
    for block in blocks:
        total = (total + int.from_bytes(block, "little") + 2**128) * r % P
    return total, r


def forged(nonce: bytes, tag: bytes, change: Callable[[bytes], bytes], data: bytes) -> bytes:
    """Other ciphertext with the same `tag`: `change` of the plaintext, but for its last 16 bytes.

    The last block is what the tag needs. It exists for one plaintext in two or so: `change` may
    be asked again.
    """
    stream = keystream(nonce, len(data))
    s = int.from_bytes(stream[16:32], "little")
    wanted = (int.from_bytes(tag, "little") - s) % 2**128
    for _ in range(64):
        plain = change(bytes(a ^ b for a, b in zip(data, stream[32:], strict=True)))
        cipher = bytes(a ^ b for a, b in zip(plain, stream[32:], strict=True))
        blocks = [cipher[at : at + 16] for at in range(0, len(cipher) - 16, 16)]
        total, r = poly1305(stream, blocks)
        for more in range(4):
            block = ((wanted + more * 2**128) * pow(r, -1, P) - total) % P
            if 2**128 <= block < 2**129:
                return b"".join(blocks) + (block - 2**128).to_bytes(16, "little")
    raise AssertionError("no block was found")


def change_weights(path: Path, name: str) -> None:
    """The tensor `name` becomes the attacker's; its header, tags included, stays."""
    source = LocalSource(path)
    index = index_of(path)
    record = next(one for one in index.tensors if one.name == name)
    header = read_header(source, record, index)
    source.close()
    assert header.chunks is not None
    assert header.chunks.count == 1
    fill = iter(range(1, 100))

    def his(plain: bytes) -> bytes:
        return torch.full((len(plain) // 4,), float(next(fill))).numpy().tobytes()

    data = bytearray(path.read_bytes())
    old = bytes(data[record.data_offset : record.end])
    new = forged(header.chunks.nonce, bytes(header.chunks.tags[:16]), his, old)
    data[record.data_offset : record.end] = new
    path.write_bytes(data)


def environ(bundle: Path, owner: Pair, **more: str) -> dict[str, str]:
    return {
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_KEY": KEY.hex(),
        "TENSORSERVE_SIGNATURE_KEY_FILE": str(owner.public),
        **more,
    }


def test_weights_with_the_same_tags(bundle: Path, owner: Pair) -> None:
    """Refused, since digests are compared; with the tags alone served, as the threat model says."""
    good = load(environ(bundle, owner))[LAYERS[0]]
    change_weights(bundle / "model.tensors", LAYERS[0])
    with pytest.raises(CorruptError, match=LAYERS[0]):
        load(environ(bundle, owner))
    served = load(environ(bundle, owner, TENSORSERVE_VERIFY="manifest"))[LAYERS[0]]
    assert not torch.equal(good, served)
    assert len(set(served.flatten().tolist()[:-4])) == 1


def test_a_bundle_of_his_with_a_good_mac(tmp_path: Path, bundle: Path, owner: Pair) -> None:
    """He can pack another model with the key, and that is all: 65 before a key is asked for."""
    other = make_source(tmp_path / "other", seed=9)
    pack(other, str(tmp_path / "his"), access=Access(), key=Secret(KEY, "stolen"))
    shutil.copy(bundle / "model.sig", tmp_path / "his")
    with pytest.raises(CorruptError, match="is not the file that was signed"):
        load(environ(tmp_path / "his", owner))


def test_an_adapters_weights_with_the_same_tags(tmp_path: Path, owner: Pair) -> None:
    """Refused as the model's are. What he writes is 1.0 or more, never what was there."""
    given, there = make_adapter(tmp_path / "given", 0.5), tmp_path / "store" / "sql"
    key = Secret(KEY, "the owner")
    identity = AdapterIdentity("sql", None)
    pack_adapter(given, str(there), identity, access=Access(), key=key, signer=owner.signer)
    settings = environ(tmp_path, owner) | {"TENSORSERVE_ADAPTERS_URI": str(there.parent)}
    base = BaseModel(frozenset({"served"}), 8)
    source = AdapterSource(Settings.from_environment(settings), base, tmp_path / "found")
    source.hold(source.find("sql")).release()
    change_weights(there / "adapter_model.tensors", "base_model.model.a.lora_A.weight")
    with pytest.raises(AdapterRefused, match="lora_A") as caught:
        source.hold(source.find("sql"))
    assert caught.value.reason == "corrupt"
