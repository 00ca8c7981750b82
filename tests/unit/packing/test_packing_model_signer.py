"""pack, sign and rewrap --sign-key: the bundle's signature is good, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from s3server import S3Server

from hf_samples import ACCESS, make_model
from manifests import as_version_1
from model_signers import Pair, make_pair, verify_key, verify_key_process
from s3_clients import s3_access, s3_client
from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.manifest import MANIFEST, SIGNATURE
from tensorserve.bundle.model_signature import read_signature
from tensorserve.bundle.signature_trust import TrustedKeys
from tensorserve.bundle.verify import verify
from tensorserve.errors import ConfigurationError, CorruptError, SignatureError
from tensorserve.packing import sign as sign_module
from tensorserve.packing.pack import pack
from tensorserve.packing.rewrap import rewrap
from tensorserve.packing.sign import sign
from tensorserve.secret import Secret
from tensorserve.sources import Access
from tensorserve.wrapping.base import Services
from tensorserve.wrapping.providers import for_wrapping

SECRET = Secret(bytes(range(32)), "the test")
KEY = GivenKey(SECRET.reveal(), "the test")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path)


def packed(tmp_path: Path, pair: Pair | None, uri: str = "", access: Access = ACCESS) -> str:
    """The URI of a bundle, signed with `pair`."""
    uri = uri or str(tmp_path / "b")
    source = tmp_path / "hf"
    if not source.exists():
        make_model(source)
    signer = None if pair is None else pair.signer
    pack(source, uri, access=access, key=SECRET, signer=signer, overwrite=True)
    return uri


def download(s3: S3Server, bucket: str, prefix: str, to: Path) -> Path:
    """What `aws s3 sync` would do."""
    client = s3_client(s3)
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
        path = to / entry["Key"].removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, entry["Key"], str(path))
    return to


def test_a_downloaded_bundle_needs_no_tool_of_ours(
    tmp_path: Path, pair: Pair, s3: S3Server, bucket: str
) -> None:
    """Packed to S3, and signed there later: `model_signing verify key` accepts both."""
    access = Access(s3=s3_access(s3))
    for name, signer in (("at-once", pair), ("later", None)):
        uri = packed(tmp_path, signer, f"s3://{bucket}/{name}", access)
        if signer is None:
            signed = sign(uri, access, KEY, wish="auto", signer=pair.signer)
            assert f"signed by key {pair.signer.by.fingerprint}" in str(signed)
        here = download(s3, bucket, name, tmp_path / name)
        code, said = verify_key_process(here, pair.public)
        assert (code, said) == (0, "Verification succeeded\n")
        with (here / "model.tensors").open("r+b") as weights:
            weights.seek(-1000, 2)
            weights.write(b"x")
        code, said = verify_key(here, pair.public)
        assert code != 0
        assert "model.tensors" in said


def test_sign_keeps_a_good_manifest_and_signs_all_that_is_there(tmp_path: Path, pair: Pair) -> None:
    """Else running servers with a pin would lose it; and the tool looks at each file."""
    uri = packed(tmp_path, None)
    (tmp_path / "b" / "NOTES.txt").write_text("beside the manifest")
    before = (tmp_path / "b" / MANIFEST).read_bytes()
    signed = sign(uri, ACCESS, KEY, wish="auto", signer=pair.signer)
    assert (tmp_path / "b" / MANIFEST).read_bytes() == before
    assert signed.also == ("NOTES.txt",)
    assert "NOTES.txt" in str(signed)
    assert signed.left_out == ()
    assert verify_key(tmp_path / "b", pair.public)[0] == 0
    # Once more, with another key: it is a signature as the first one.
    other = make_pair(tmp_path, "other")
    sign(uri, ACCESS, KEY, wish="auto", signer=other.signer)
    assert verify_key(tmp_path / "b", other.public)[0] == 0


def test_sign_raises_an_old_manifest_first(tmp_path: Path, pair: Pair) -> None:
    """Version 1 authenticates nothing."""
    uri = packed(tmp_path, None)
    path = tmp_path / "b" / MANIFEST
    as_version_1(tmp_path / "b")
    sign(uri, ACCESS, KEY, wish="tags", signer=pair.signer)
    assert json.loads(path.read_text())["version"] == 2
    assert verify_key(tmp_path / "b", pair.public)[0] == 0


def test_what_is_damaged_or_replaced_meanwhile_is_not_signed(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a small file, nor weights that are others than those that were verified."""
    uri = packed(tmp_path, None)
    real = sign_module.verify

    def replaced_after(name: str) -> None:
        path = tmp_path / "b" / name

        def verified(*words: object, **options: object) -> object:
            found = real(*words, **options)  # type: ignore[arg-type]
            data = bytearray(path.read_bytes())
            data[-9] ^= 1
            path.write_bytes(data)
            return found

        monkeypatch.setattr(sign_module, "verify", verified)

    for name in ("config.json", "model.tensors"):
        packed(tmp_path, None)
        replaced_after(name)
        with pytest.raises(CorruptError, match=rf"{name}.* was replaced while"):
            sign(uri, ACCESS, KEY, wish="auto", signer=pair.signer)
        assert not (tmp_path / "b" / SIGNATURE).exists()
    monkeypatch.setattr(sign_module, "verify", real)
    with pytest.raises(CorruptError, match="damaged"):
        sign(uri, ACCESS, KEY, wish="auto", signer=pair.signer)


def test_no_signature_outlives_what_was_signed(tmp_path: Path, pair: Pair) -> None:
    """pack --overwrite takes it away; sign and rewrap without a key do not start."""
    uri = packed(tmp_path, pair)
    before = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir() if p.is_file()}
    add = f"file:{tmp_path / 'wrapping'}"
    (tmp_path / "wrapping").write_bytes(bytes(range(5, 37)))
    with pytest.raises(ConfigurationError, match="is signed"):
        sign(uri, ACCESS, KEY, wish="auto")
    with pytest.raises(ConfigurationError, match="is signed"):
        rewrap(uri, ACCESS, KEY, Services(), add=[add])
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir() if p.is_file()}
    packed(tmp_path, None)
    assert not (tmp_path / "b" / SIGNATURE).exists()


def test_rewrap_signs_again_without_reading_the_weights(tmp_path: Path, pair: Pair) -> None:
    """What it takes over of the old signature has to be the signer's own, or of one he accepts."""
    uri = packed(tmp_path, pair)
    (tmp_path / "wrapping").write_bytes(bytes(range(5, 37)))
    add = [f"file:{tmp_path / 'wrapping'}"]
    other = make_pair(tmp_path, "other")
    weights = tmp_path / "b" / "model.tensors"
    kept = weights.read_bytes()
    weights.unlink()  # it cannot have been read
    with pytest.raises(SignatureError, match="not of the key"):
        rewrap(uri, ACCESS, KEY, Services(), add=add, signer=other.signer)
    done = rewrap(uri, ACCESS, KEY, Services(), add=add, signer=pair.signer)
    assert pair.signer.by.fingerprint in str(done)
    weights.write_bytes(kept)
    assert verify_key(tmp_path / "b", pair.public)[0] == 0
    trust = TrustedKeys.parse(Secret(pair.public.read_bytes(), "the test"))
    rewrap(uri, ACCESS, KEY, Services(), add=add, signer=other.signer, trust=trust)
    assert verify_key(tmp_path / "b", other.public)[0] == 0
    # Another manifest than the signed one is not signed again.
    path = tmp_path / "b" / MANIFEST
    path.write_bytes(path.read_bytes() + b"\n")
    before = (tmp_path / "b" / SIGNATURE).read_bytes()
    with pytest.raises(SignatureError, match="is not the file that was signed"):
        rewrap(uri, ACCESS, KEY, Services(), add=add, signer=other.signer)
    (tmp_path / "b" / SIGNATURE).unlink()
    with pytest.raises(SignatureError, match="is not signed"):
        rewrap(uri, ACCESS, KEY, Services(), add=add, signer=other.signer)
    assert before


def test_rewrap_in_a_bucket(tmp_path: Path, pair: Pair, s3: S3Server, bucket: str) -> None:
    """Both files, each only over what was read."""
    access = Access(s3=s3_access(s3))
    uri = packed(tmp_path, pair, f"s3://{bucket}/signed-rewrap", access)
    (tmp_path / "wrapping").write_bytes(bytes(range(5, 37)))
    add = f"file:{tmp_path / 'wrapping'}"
    assert for_wrapping(add, Services()).kind == "file"
    rewrap(uri, access, KEY, Services(), add=[add], signer=pair.signer)
    here = download(s3, bucket, "signed-rewrap", tmp_path / "here")
    assert verify_key(here, pair.public)[0] == 0


def test_verify_compares_every_file_with_what_was_signed(tmp_path: Path, pair: Pair) -> None:
    """Also one that the manifest does not name, and one that is gone."""
    uri = packed(tmp_path, None)
    notes = tmp_path / "b" / "NOTES.txt"
    notes.write_text("beside the manifest")
    sign(uri, ACCESS, KEY, wish="auto", signer=pair.signer)
    trust = TrustedKeys.parse(Secret(pair.public.read_bytes(), "the test"))
    signature = read_signature(uri, ACCESS, trust)
    found = {r.name: r for r in verify(uri, ACCESS, KEY, signature=signature).results}
    assert {r.state for r in found.values()} == {"ok"}
    assert all("as signed" in r.detail for name, r in found.items() if name != SIGNATURE)
    assert found[SIGNATURE].detail == f"signed by {pair.signer.by}"
    notes.write_text("another text")
    with pytest.raises(CorruptError, match=r"NOTES\.txt: its SHA-256 is not the signed one"):
        verify(uri, ACCESS, KEY, signature=signature)
    notes.unlink()
    with pytest.raises(CorruptError, match=r"NOTES\.txt: signed, and missing"):
        verify(uri, ACCESS, KEY, signature=signature)
    # Without a key to compare with, nothing is said of the signature.
    states = {r.name: r.state for r in verify(uri, ACCESS, KEY).results}
    assert states[SIGNATURE] == "unchecked"


def test_a_signature_of_the_original_is_left_out(tmp_path: Path) -> None:
    """Publishers sign their repositories with the same name; it is not of the bundle's files."""
    make_model(tmp_path / "hf")
    (tmp_path / "hf" / SIGNATURE).write_text("theirs")
    result = pack(tmp_path / "hf", str(tmp_path / "b"), access=ACCESS, key=SECRET)
    assert "a signature of the original files" in result.left_out[SIGNATURE]
    assert not (tmp_path / "b" / SIGNATURE).exists()
