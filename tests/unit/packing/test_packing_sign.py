"""sign: verifies, then writes a manifest that holds; never over something that is not in order."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from s3server import S3Server
from tensorizer import EncryptionParams, TensorSerializer

from hf_samples import ACCESS, SMALL_FILES, add_small_files, make_model
from manifests import as_version_1, rewrite
from s3_clients import s3_access, s3_client
from tensorserve.bundle.keys import parse_key, parse_passphrase
from tensorserve.bundle.manifest import MANIFEST, read_manifest
from tensorserve.bundle.verify import verify
from tensorserve.errors import ConfigurationError, CorruptError, UsageError
from tensorserve.packing.pack import pack
from tensorserve.packing.sign import Signed, sign
from tensorserve.secret import Secret
from tensorserve.sources import Access

SECRET = Secret(bytes(range(32)), "the test")
KEY = parse_key(SECRET)


def signed(bundle: Path | str, key: object = KEY, wish: str = "auto") -> Signed:
    return sign(str(bundle), ACCESS, key, wish=wish)  # type: ignore[arg-type]


def theirs(directory: Path, params: EncryptionParams | None) -> Path:
    """A bundle as tensorizer's users have it: no manifest."""
    directory.mkdir()
    add_small_files(directory)
    (directory / "pytorch_model.bin").unlink()
    serializer = TensorSerializer(str(directory / "model.tensors"), encryption=params)
    serializer.write_state_dict({f"layers.{n}.weight": torch.full((9, 7), n) for n in range(5)})
    serializer.close()
    return directory


@pytest.mark.parametrize("sealed", ["key", "passphrase", "plain"])
def test_a_bundle_of_tensorizers_gets_a_manifest_that_vouches(tmp_path: Path, sealed: str) -> None:
    """For its weights and every small file; a start then needs no digests any more."""
    cheap = EncryptionParams.OpsLimit.MIN, EncryptionParams.MemLimit.MIN
    params, key = {
        "key": (EncryptionParams(SECRET.reveal()), KEY),
        "passphrase": (
            EncryptionParams.from_string("pass", opslimit=cheap[0], memlimit=cheap[1]),
            parse_passphrase(Secret("pass", "the test")),
        ),
        "plain": (None, None),
    }[sealed]
    bundle = theirs(tmp_path / "b", params)
    before = (bundle / "model.tensors").read_bytes()
    result = signed(bundle, key)
    assert (bundle / "model.tensors").read_bytes() == before
    assert set(result.files) == {"model.tensors", *SMALL_FILES, "README.md", "modeling_own.py"}
    assert result.left_out == (".gitattributes",)
    assert result.sha256 == hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    assert result.sha256 in str(result)
    manifest = read_manifest(str(bundle), ACCESS, key)
    assert manifest is not None
    assert manifest.authenticated_by == (None if sealed == "plain" else "key")
    assert (manifest.encryption and manifest.encryption.key) == (
        None if sealed == "plain" else sealed
    )
    verified = verify(str(bundle), ACCESS, key)
    assert {r.state for r in verified.results if r.name not in {MANIFEST, ".gitattributes"}} == {
        "ok"
    }
    assert not list(bundle.glob(".*partial"))


def test_a_bundle_of_version_1_is_raised(tmp_path: Path) -> None:
    """Its manifest is compared first; its own files stay the ones it names."""
    bundle = theirs(tmp_path / "b", EncryptionParams(SECRET.reveal()))
    signed(bundle)
    as_version_1(bundle)
    (bundle / "added.json").write_text("{}")
    result = signed(bundle)
    assert "added.json" in result.left_out
    manifest = read_manifest(str(bundle), ACCESS, KEY)
    assert manifest is not None
    assert (manifest.version, manifest.authenticated_by) == (2, "key")


@pytest.mark.parametrize("damage", ["weights", "small file", "manifest"])
def test_what_is_damaged_is_not_signed(tmp_path: Path, damage: str) -> None:
    """Exit code 65, and the manifest stays as it was."""
    pack(make_model(tmp_path / "hf"), str(tmp_path / "b"), access=ACCESS, key=SECRET)
    bundle = tmp_path / "b"
    if damage == "manifest":
        rewrite(bundle, {"made_by": {}})
    else:
        path = bundle / ("model.tensors" if damage == "weights" else "config.json")
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(CorruptError) as caught:
        signed(bundle)
    assert caught.value.exit_code == 65
    assert (bundle / MANIFEST).read_bytes() == before


def test_sealed_tensors_without_digests_are_signed_if_accepted(
    tmp_path: Path,
) -> None:
    """Somebody may have exchanged them: the same word as for a start."""
    pack(make_model(tmp_path / "hf"), str(tmp_path / "b"), access=ACCESS, key=SECRET)
    bundle = tmp_path / "b"
    (bundle / MANIFEST).unlink()
    with pytest.raises(CorruptError, match="TENSORSERVE_VERIFY=tags"):
        signed(bundle)
    assert not (bundle / MANIFEST).exists()
    signed(bundle, wish="tags")
    verify(str(bundle), ACCESS, KEY)


def test_who_asks_for_a_manifest_can_make_one(tmp_path: Path) -> None:
    """`sign` is what TENSORSERVE_VERIFY=manifest is told to do."""
    bundle = theirs(tmp_path / "b", EncryptionParams(SECRET.reveal()))
    with pytest.raises(CorruptError, match="tensorserve sign"):
        verify(str(bundle), ACCESS, KEY, wish="manifest")
    signed(bundle, wish="manifest")
    verify(str(bundle), ACCESS, KEY, wish="manifest")


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    """A web server; one file; a directory that is another's."""
    with pytest.raises(ConfigurationError, match="cannot be written there"):
        signed("https://example.org/model")
    with pytest.raises(UsageError):
        signed(tmp_path / "model.tensors")


def test_a_bundle_in_s3_is_signed(tmp_path: Path, s3: S3Server, bucket: str) -> None:
    """The manifest appears in one step, beside what is there."""
    bundle = theirs(tmp_path / "b", EncryptionParams(SECRET.reveal()))
    client = s3_client(s3)
    for name in ("model.tensors", "config.json"):
        client.upload_file(str(bundle / name), bucket, f"signed/{name}")
    access = Access(s3=s3_access(s3))
    uri = f"s3://{bucket}/signed"
    result = sign(uri, access, KEY, wish="auto")
    assert result.files == ("model.tensors", "config.json")
    verified = verify(uri, access, KEY)
    assert {r.state for r in verified.results} == {"ok"}


def test_a_signed_bundle_can_be_copied(tmp_path: Path) -> None:
    """Nothing in the manifest is bound to the place."""
    bundle = theirs(tmp_path / "b", EncryptionParams(SECRET.reveal()))
    signed(bundle)
    shutil.copytree(bundle, tmp_path / "c")
    verify(str(tmp_path / "c"), ACCESS, KEY)
