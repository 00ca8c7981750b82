"""Do we read what each released tensorizer wrote, from 2.10.1 on? files/make.py made the files."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tensors_samples import PASSPHRASE, FixedKey, MemorySource
from tensorserve.bundle.keys import parse_passphrase
from tensorserve.format import FileKey, read_index, read_tensor
from tensorserve.secret import Secret

FILES = Path(__file__).parent / "files"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FILES / "expected.json").read_text())


def _key(sealing: str) -> FileKey | None:
    if sealing == "passphrase":
        return parse_passphrase(Secret(PASSPHRASE))
    return FixedKey() if sealing == "key" else None


def test_every_sample_is_expected() -> None:
    """No file without a test, no test without its file."""
    assert {path.name for path in FILES.glob("*.gz")} == {f"{name}.gz" for name in EXPECTED}
    assert {name.split("-")[-1] for name in EXPECTED} == {
        f"{version}.tensors" for version in ("2.10.1", "2.11.0", "2.11.1", "2.12.0", "2.12.1")
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_of_a_released_tensorizer_is_read(name: str) -> None:
    """Data version, names in order, kinds, dtypes, shapes and bytes, every hash and tag checked."""
    expected = EXPECTED[name]
    source = MemorySource(gzip.decompress((FILES / f"{name}.gz").read_bytes()))
    key = _key(expected["sealing"])

    index = read_index(source)

    assert (index.file_version, index.encrypted) == (expected["data_version"], key is not None)
    assert [
        {
            "name": record.name,
            "kind": record.kind,
            "dtype": record.dtype,
            "shape": list(record.shape),
            "meta": record.is_meta,
            "sha256": hashlib.sha256(read_tensor(source, record, index, key)).hexdigest(),
        }
        for record in index.tensors
    ] == expected["tensors"]


@pytest.mark.parametrize("version", range(1, 6))
def test_each_data_version_is_among_the_samples(version: int) -> None:
    """Of those that we accept, none is accepted unseen."""
    assert version in {expected["data_version"] for expected in EXPECTED.values()}
