"""A file's headers are those of its manifest, or what they were; all readers ask the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tensorserve.errors import CorruptError
from tensorserve.launch import lora_adapters
from tensorserve.loading import assembler, reference, stream
from tensorserve.loading.header_check import check_headers
from tensorserve.sources import ReplacedError
from tensorserve.sources.local import LocalSource

HEADERS = {4: b"second", 0: b"one "}
DIGEST = hashlib.sha256(b"one second").hexdigest()


class Unpinned(LocalSource):
    """As behind a server that names no version."""

    pinned = False


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(b"one second")
    return tmp_path / "f"


@pytest.mark.parametrize("kind", [LocalSource, Unpinned])
@pytest.mark.parametrize("connections", [None, 1])
def test_the_manifests_digest_counts_in_file_order(
    path: Path, kind: type[LocalSource], connections: int | None
) -> None:
    """And nothing is read again for it: the file may be gone."""
    source = kind(path)
    source.close()
    check_headers(source, HEADERS, DIGEST, connections=connections)
    with pytest.raises(CorruptError, match="not those of the manifest"):
        check_headers(source, HEADERS, "0" * 64, connections=connections)


@pytest.mark.parametrize("connections", [None, 1])
def test_without_manifest_and_version_headers_are_read_again(
    path: Path, connections: int | None
) -> None:
    """The one that is another now is enough."""
    source = Unpinned(path)
    check_headers(source, HEADERS, None, connections=connections)
    changed = HEADERS | {4: b"seconD"}
    with pytest.raises(ReplacedError, match="was replaced while it was read"):
        check_headers(source, changed, None, connections=connections)
    check_headers(LocalSource(path), changed, None, connections=connections)


@pytest.mark.parametrize("module", [lora_adapters, assembler, stream, reference])
def test_no_reader_has_a_check_of_its_own(module: object) -> None:
    """The words of both errors stand in one place."""
    text = Path(str(module.__file__)).read_text()  # type: ignore[attr-defined]
    assert "not those of the manifest" not in text
    assert "was replaced while" not in text
