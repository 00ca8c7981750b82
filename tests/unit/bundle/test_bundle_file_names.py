"""Names of a bundle's files: what could lead out of it, and that every other one works."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from s3server import S3Server

from rangeserver import RangeServer
from s3_clients import s3_access, s3_client
from tensorserve.bundle.download import fetch_artifacts
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.bundle.manifest import FileEntry, Manifest, parse_manifest
from tensorserve.errors import CorruptError
from tensorserve.sources import Access, join, list_names, open_source

ODD = (
    "with space.json", "a?b.json", "a#b.json", "100%.json", "a%20b.json", "%41.json", "ümläut.json",
    "模型/分词器.json", "a&b=c+d;e,f@g:h!$'()*~.json", "sub dir/[x].json", "%zz.json", "a%3Fb.json",
)  # fmt: skip
LEAVING = (
    "..", "../x", "%2e%2e/x", "%2E%2e/x", ".%2e/x", "a/%2e%2e/%2e%2e/x", "%252e%252e/x",
    "%25252e%25252e/x", "a%2f..%2fx", "%2fetc/passwd", "a%5c..%5cx", "%00", "a%0ab", "a\nb",
    "a\x1b",     "a\x7f", ".", "%2e", "", "/x", "//x", "a//b", "a/", "a\\b", "x" * 1025,
)  # fmt: skip


@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_could_leave_the_bundle_is_refused(name: str) -> None:
    """As it stands, and as it would be after any number of decodings."""
    assert leaves_bundle(name)
    document = {
        "format": "tensorserve-bundle",
        "version": 1,
        "layout": "hf",
        "files": [{"name": name, "size": 1, "sha256": "0" * 64}],
        "tensors_files": {},
        "encryption": None,
        "made_by": {},
    }
    with pytest.raises(CorruptError, match="outside the bundle"):
        parse_manifest(json.dumps(document).encode(), "m")


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_is_a_name(name: str) -> None:
    """Models of all countries are served."""
    assert not leaves_bundle(name)


def write_bundle(directory: Path) -> Manifest:
    """Every odd name, with its name as content, and decoys where a decoded one would lead."""
    entries = []
    for name in (*ODD, "config.json"):
        content = f"of {name}".encode()
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
        entries.append(FileEntry(name, len(content), hashlib.sha256(content).hexdigest()))
    for decoy in ("a b.json", "A.json"):
        (directory / decoy).write_text("another file")
    return Manifest(files=tuple(entries), tensors_files={}, encryption=None, made_by={})


def check_fetched(uri: str, access: Access, manifest: Manifest, out: Path) -> None:
    written = fetch_artifacts(uri, access, out, manifest)
    assert set(written) == {*ODD, "config.json"}
    for name in written:
        assert (out / name).read_text() == f"of {name}"


@pytest.mark.parametrize("folder", ["bundle", "my models"])
def test_odd_names_are_fetched_over_http_from_files_and_by_path(
    tmp_path: Path, folder: str
) -> None:
    """Encoded when they are sent, where URIs are encoded."""
    manifest = write_bundle(tmp_path / folder)
    with RangeServer(tmp_path) as server:
        uri = f"{server.url}/{folder.replace(' ', '%20')}"
        check_fetched(uri, Access(), manifest, tmp_path / "out")
    for uri in (f"file://{tmp_path}/{folder.replace(' ', '%20')}", str(tmp_path / folder)):
        check_fetched(uri, Access(), manifest, tmp_path / "out")


def test_odd_names_are_fetched_from_s3(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """A key has every character as it is; the request encodes it, and is signed as it is sent."""
    manifest = write_bundle(tmp_path / "bundle")
    client = s3_client(s3)
    for path in (tmp_path / "bundle").rglob("*.json"):
        key = f"odd names?#%20/{path.relative_to(tmp_path / 'bundle')}"
        client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    access = Access(s3=s3_access(s3))
    uri = f"s3://{bucket}/odd names?#%20"
    assert set(ODD) <= set(list_names(uri, access) or ())
    check_fetched(uri, access, manifest, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")


def test_a_signature_stays_behind_an_encoded_name(tmp_path: Path) -> None:
    """A SAS token is for the whole container."""
    (tmp_path / "a?b.json").write_text("x")
    with RangeServer(tmp_path) as server:
        uri = join(f"{server.url}?sv=1&sig=a%2Bb", "a?b.json")
        assert uri == f"{server.url}/a%3Fb.json?sv=1&sig=a%2Bb"
        assert open_source(uri, Access()).read(0, 1) == b"x"
