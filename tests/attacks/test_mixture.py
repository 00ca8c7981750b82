"""A15: a file is replaced while it is loaded, and the source cannot name its version."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forging import cut_digests
from sealed_versions import ACCESS, KEY, READERS, Version, file_key, load, make_version, reading
from two_versions import TwoVersions

from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.tensors_file import open_tensors
from tensorserve.errors import CorruptError
from tensorserve.loading import LoadOptions

# None of them changes with the bytes.
UNPINNED = {
    "nothing": {},
    "weak": {"ETag": 'W/"1"'},
    "date": {"Last-Modified": "Mon, 30 Nov 2026 02:00:00 GMT"},
}


@pytest.fixture(scope="module", params=[True, False], ids=["sealed", "plain"])
def versions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Version, Version]:
    folder: Path = tmp_path_factory.mktemp("versions")
    return tuple(make_version(folder, seed, encrypted=request.param) for seed in (1, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("headers", UNPINNED.values(), ids=UNPINNED)
def test_tensors_of_two_versions_never_make_one_model(
    versions: tuple[Version, Version], headers: dict[str, str], reader: str
) -> None:
    """The file is replaced after a few tensors. Each tensor by itself is whole and opens."""
    old, new = versions
    key = file_key() if old.index.encrypted else None
    taken: dict[str, str] = {}
    with TwoVersions(old.data, old.data, headers) as server:
        opened = open_tensors(server.uri, ACCESS, key)
        assert not opened.source.pinned
        options = LoadOptions(connections=1, ahead_bytes=2**20, verify_hashes=key is None)
        stream = reading(opened, options, reader)
        with pytest.raises(CorruptError, match="was replaced") as caught, stream:
            take(stream, taken, lambda: server.replace(new.data))
        opened.source.close()
    assert caught.value.exit_code == 65
    assert len(taken) == len(new.digests) - 1


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("headers", UNPINNED.values(), ids=UNPINNED)
def test_what_is_not_replaced_loads_from_such_a_source(
    versions: tuple[Version, Version], headers: dict[str, str], reader: str
) -> None:
    """No ETag is no error by itself."""
    old, _ = versions
    taken: dict[str, str] = {}
    with TwoVersions(old.data, old.data, headers) as server:
        key = file_key() if old.index.encrypted else None
        load(server.uri, taken, key=key, verify_hashes=key is None, reader=reader)
    assert taken == old.digests


def test_plain_weights_without_digests_are_no_tensors_file(tmp_path: Path) -> None:
    """Nothing else could tell two versions of them apart."""
    path = tmp_path / "model.tensors"
    path.write_bytes(make_version(tmp_path, 1, encrypted=False).data)
    cut_digests(path)
    with pytest.raises(CorruptError, match="holds no SHA-256"):
        load(str(path), {}, key=None)


def take(stream: Any, taken: dict[str, str], after_each: Callable[[], None]) -> None:
    """Take all tensors, as a model does."""
    for record, _ in stream:
        taken[record.name] = ""
        after_each()


@pytest.mark.parametrize("reader", READERS)
def test_a_local_file_written_over_with_its_date_kept_is_seen(
    tmp_path: Path, versions: tuple[Version, Version], reader: str
) -> None:
    """In place (the same inode), of the same size, the time of its last write set back."""
    old, new = versions
    path = tmp_path / "model.tensors"
    path.write_bytes(old.data)
    before = path.stat()
    key = GivenKey(KEY, "the test") if old.index.encrypted else None
    opened = open_tensors(str(path), ACCESS, key)
    with path.open("r+b") as file:
        file.write(new.data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    stream = reading(opened, LoadOptions(connections=1), reader)
    with pytest.raises(CorruptError, match="was changed"), stream:
        take(stream, {}, lambda: None)
    opened.source.close()
