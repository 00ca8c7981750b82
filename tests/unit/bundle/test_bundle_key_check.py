"""Is a wrong key told from a damaged file, before anything else is read?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorizer import EncryptionParams, TensorSerializer

from tensorserve.bundle.key_check import prove_key
from tensorserve.bundle.keys import parse_key, parse_passphrase
from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.format import read_index
from tensorserve.format.header import FileKey
from tensorserve.secret import Secret

KEY = bytes(range(32))
ORIGIN = "TENSORSERVE_KEY_FILE=/run/secrets/k"
TENSORS = {
    "large": torch.zeros(3 * 2**20),
    "small": torch.ones(4),
    "medium": torch.ones(500),
    "meta": torch.empty(3, device="meta"),
}


class BytesSource:
    """A source over bytes, that counts what is read."""

    version = None
    name = "s3://bucket/model.tensors"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.bytes_read = 0

    def read(self, offset: int, length: int) -> bytes:
        self.bytes_read += length
        return self.data[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))


def _write(
    folder: Path, params: EncryptionParams | None, tensors: dict[str, torch.Tensor] = TENSORS
) -> bytes:
    path = folder / "model.tensors"
    serializer = TensorSerializer(path, encryption=params)
    serializer.write_state_dict(tensors)
    serializer.close()
    return path.read_bytes()


def _prove(data: bytes, key: FileKey | None) -> int:
    """Bytes read to prove the key."""
    source = BytesSource(data)
    index = read_index(source)
    source.bytes_read = 0
    prove_key(source, index, key)
    return source.bytes_read


def _damage(data: bytes, *names: str) -> bytes:
    damaged = bytearray(data)
    for record in read_index(BytesSource(data)).tensors:
        if record.name in names:
            damaged[record.data_offset] ^= 1
    return bytes(damaged)


@pytest.fixture
def sealed(tmp_path: Path) -> bytes:
    """A file sealed with KEY."""
    return _write(tmp_path, EncryptionParams(KEY))


def test_the_right_key_is_proven_by_reading_little(sealed: bytes) -> None:
    """The smallest tensor serves: no megabytes before the start."""
    assert 0 < _prove(sealed, parse_key(Secret(KEY, ORIGIN))) < 1024


def test_the_right_passphrase_is_proven(tmp_path: Path) -> None:
    """The key is derived as the file says."""
    params = EncryptionParams.from_string("open sesame", opslimit=1, memlimit=8192)

    assert _prove(_write(tmp_path, params), parse_passphrase(Secret("open sesame\n")))


def test_the_derived_key_opens_a_passphrase_file(tmp_path: Path) -> None:
    """Whoever derived it once need not do so at every start."""
    params = EncryptionParams.from_string("open sesame", opslimit=1, memlimit=8192)

    assert _prove(_write(tmp_path, params), parse_key(Secret(params.key)))


def test_a_wrong_key_is_told_with_its_origin_and_never_shown(sealed: bytes) -> None:
    """Exit code 65, the file, where the key came from; not the key."""
    wrong = bytes(range(65, 97))

    with pytest.raises(WrongKeyError, match=ORIGIN) as caught:
        _prove(sealed, parse_key(Secret(wrong, ORIGIN)))

    assert "s3://bucket/model.tensors" in caught.value.message
    assert wrong.decode() not in str(caught.value)
    assert wrong.hex() not in str(caught.value)
    assert (caught.value.exit_code, caught.value.reason) == (65, "wrong_key")
    assert "damaged" not in str(caught.value)


def test_a_wrong_passphrase_is_told_with_its_origin(tmp_path: Path) -> None:
    """As for a key."""
    params = EncryptionParams.from_string("open sesame", opslimit=1, memlimit=8192)
    wrong = parse_passphrase(Secret("open barley", "TENSORSERVE_PASSPHRASE"))

    with pytest.raises(WrongKeyError, match="TENSORSERVE_PASSPHRASE") as caught:
        _prove(_write(tmp_path, params), wrong)

    assert "barley" not in str(caught.value)


def test_a_damaged_tensor_is_told_from_a_wrong_key(sealed: bytes) -> None:
    """Where another tensor opens, the key is right: the damage is named."""
    with pytest.raises(CorruptError, match="chunk 0 of tensor 'small'") as caught:
        _prove(_damage(sealed, "small"), parse_key(Secret(KEY, ORIGIN)))

    assert not isinstance(caught.value, WrongKeyError)


def test_with_one_tensor_damage_and_wrong_key_are_both_named(
    tmp_path: Path,
) -> None:
    """Nothing else in the file could tell."""
    data = _write(tmp_path, EncryptionParams(KEY), {"only": torch.ones(4)})

    with pytest.raises(WrongKeyError, match="or the file is damaged"):
        _prove(_damage(data, "only"), parse_key(Secret(KEY, ORIGIN)))


def test_an_encrypted_file_without_a_key_is_misconfigured(sealed: bytes) -> None:
    """Exit code 78, with the names of what to set."""
    with pytest.raises(ConfigurationError, match="is encrypted, but neither") as caught:
        _prove(sealed, None)

    assert "TENSORSERVE_KEY_FILE" in str(caught.value)


def test_a_plain_file_with_a_key_is_a_configuration_error(tmp_path: Path) -> None:
    """A plain file in an encrypted one's place was vouched for by nobody."""
    with pytest.raises(ConfigurationError, match="is not encrypted, but a key is given"):
        _prove(_write(tmp_path, None), parse_key(Secret(KEY, ORIGIN)))


def test_a_plain_file_without_a_key_needs_no_proof(tmp_path: Path) -> None:
    """Nothing is read."""
    assert _prove(_write(tmp_path, None), None) == 0


def test_a_file_in_which_nothing_is_sealed_is_nobodys(tmp_path: Path) -> None:
    """It says that it is encrypted, and that is all: without a key, anybody can write it."""
    data = _write(tmp_path, EncryptionParams(KEY), {"meta": TENSORS["meta"]})
    assert read_index(BytesSource(data)).encrypted
    with pytest.raises(CorruptError, match="nothing that the key from"):
        _prove(data, parse_key(Secret(KEY, ORIGIN)))
