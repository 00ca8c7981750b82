"""pack to S3: streamed to a real server, nothing left behind when it fails."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from s3server import S3Server
from safetensors.torch import save_file

from hf_samples import SMALL_FILES, make_model
from s3_clients import s3_access, s3_client
from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.verify import verify
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.packing import s3_upload
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access, RetryPolicy

SECRET = Secret(bytes(range(32)), "the test")
POLICY = RetryPolicy(attempts=3, deadline=5, backoff_base=0.01)
MIB = 1024**2
_numbers = itertools.count()


def access_of(server: S3Server, **changes: Any) -> Access:
    return Access(s3=s3_access(server, **changes), policy=POLICY)


@pytest.fixture(scope="module")
def client(s3: S3Server) -> Any:
    return s3_client(s3)


@pytest.fixture
def prefix(bucket: str) -> str:
    """A prefix that no other test uses."""
    return f"s3://{bucket}/packing/{next(_numbers)}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MiB: three parts."""
    directory = tmp_path_factory.mktemp("large")
    content = {f"t{i}": torch.full((8, MIB), i, dtype=torch.uint8) for i in range(5)}
    save_file(content, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def names_below(client: Any, prefix: str) -> list[str]:
    bucket, _, key = prefix.removeprefix("s3://").partition("/")
    answer = client.list_objects_v2(Bucket=bucket, Prefix=key + "/")
    return sorted(entry["Key"].removeprefix(key + "/") for entry in answer.get("Contents", ()))


def unfinished(client: Any, bucket: str) -> list[str]:
    found = client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())
    return [upload["Key"] for upload in found]


def test_a_bundle_in_s3_verifies(s3: S3Server, client: Any, model: Path, prefix: str) -> None:
    """Packed and read back through signed requests."""
    result = pack(model, prefix, access=access_of(s3), key=SECRET)
    assert names_below(client, prefix) == sorted(
        [*SMALL_FILES, "manifest.json", "model.safetensors", "model.tensors"]
    )
    assert result.destination == prefix
    states = {r.state for r in verify(prefix, access_of(s3), parse_key(SECRET)).results}
    assert states == {"ok"}


def test_large_tensors_go_up_in_parts(
    s3: S3Server, client: Any, bucket: str, large_model: Path, prefix: str
) -> None:
    """An object of several parts, whose ETag says so, the same as in a directory."""
    pack(large_model, prefix, access=access_of(s3))
    key = prefix.removeprefix(f"s3://{bucket}/") + "/model.tensors"
    assert client.head_object(Bucket=bucket, Key=key)["ETag"].strip('"').endswith("-3")
    verify(prefix, access_of(s3), None)
    assert unfinished(client, bucket) == []


def test_memory_does_not_grow_with_the_model(s3: S3Server, tmp_path: Path, prefix: str) -> None:
    """480 MB in tensors of 16 MiB: the parts on their way, and two tensors."""
    source = tmp_path / "hf"
    source.mkdir()
    content = {f"t{i}": torch.full((16, MIB), i, dtype=torch.uint8) for i in range(30)}
    save_file(content, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    script = """
import re, sys
from pathlib import Path
import boto3
from tensorserve.packing import s3_upload
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access, S3Access
def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+)", status)[1])
endpoint, user, secret = sys.argv[3:]
s3 = S3Access(endpoint_url=endpoint, region="us-east-1",
              access_key_id=Secret(user), secret_access_key=Secret(secret))
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
pack(Path(sys.argv[1]), sys.argv[2], access=Access(s3=s3), key=Secret(bytes(32)))
print((memory("VmHWM") - before) * 1024)
"""
    words = [str(source), prefix, s3.endpoint_url, s3.access_key, s3.secret_key]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
    )
    # botocore's own modules, too, come in on the way.
    assert 32 * MIB < int(done.stdout) < 200 * MIB


def test_nothing_is_visible_before_all_is_there(
    s3: S3Server, client: Any, model: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has everything before the first name appears; the manifest's is the last."""
    seen, finish = [], s3_upload.Upload.finish

    def observed(upload: s3_upload.Upload) -> None:
        seen.append(names_below(client, prefix))
        finish(upload)

    monkeypatch.setattr(s3_upload.Upload, "finish", observed)
    pack(model, prefix, access=access_of(s3))
    assert seen[0] == []
    assert len(seen) == len(SMALL_FILES) + 3
    assert not any("manifest.json" in names for names in seen)


def test_a_failed_overwrite_keeps_the_old_bundle(
    s3: S3Server, client: Any, bucket: str, prefix: str, tmp_path: Path
) -> None:
    """And it still verifies, whatever of the new one was uploaded."""
    source = make_model(tmp_path / "hf")
    pack(source, prefix, access=access_of(s3))

    def grow(done: int, total: int) -> None:
        if done == total:
            (source / "tokenizer.json").write_text("longer than it was before")

    with pytest.raises(CorruptError, match=r"tokenizer\.json was changed"):
        pack(source, prefix, access=access_of(s3), key=SECRET, overwrite=True, progress=grow)
    results = verify(prefix, access_of(s3), None).results
    assert {result.state for result in results if result.name != "manifest.json"} == {"ok"}
    assert unfinished(client, bucket) == []


def test_what_could_not_be_removed_is_said(
    s3: S3Server,
    client: Any,
    bucket: str,
    large_model: Path,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the first error, which it does not hide: parts that stay are paid for."""

    def refuse(*_: object) -> None:
        raise PermissionDeniedError("no s3:AbortMultipartUpload")

    def fail(done: int, _: int) -> None:
        if done >= 30 * MIB:
            raise ConfigurationError("the first error")

    with monkeypatch.context() as patched:
        patched.setattr(s3_upload.Bucket, "abort", refuse)
        with pytest.raises(ConfigurationError, match="the first error") as caught:
            pack(large_model, prefix, access=access_of(s3), progress=fail)
    assert "no s3:AbortMultipartUpload" in caught.value.__notes__[0]
    (left,) = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    s3_upload.Bucket(client, bucket, "us-east-1").abort(left["Key"], left["UploadId"])


def test_an_upload_that_is_gone_is_no_error(client: Any, bucket: str) -> None:
    """The answer to its completion was lost, say."""
    s3_upload.Bucket(client, bucket, "us-east-1").abort("nothing", "0" * 32)


@pytest.mark.parametrize("at", [1, 30 * MIB])
def test_an_interrupted_pack_leaves_nothing(
    s3: S3Server, client: Any, bucket: str, large_model: Path, prefix: str, at: int
) -> None:
    """No object, and no parts that are paid for unseen."""
    seen_parts = []

    def interrupt(done: int, _: int) -> None:
        if done >= at:
            seen_parts.append(unfinished(client, bucket))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(large_model, prefix, access=access_of(s3), progress=interrupt)
    assert seen_parts != [[]] or at == 1  # an upload was under way
    assert names_below(client, prefix) == []
    assert unfinished(client, bucket) == []


def test_what_was_uploaded_before_a_failure_is_removed(
    s3: S3Server, client: Any, prefix: str, tmp_path: Path
) -> None:
    """A small file that changes under the pack, after the tensors are in the bucket."""
    source = make_model(tmp_path / "hf")
    grown = []

    def grow(done: int, total: int) -> None:
        if done == total:
            (source / "tokenizer.json").write_text("longer than it was before")
            grown.append(1)

    with pytest.raises(Exception, match=r"tokenizer\.json was changed"):
        pack(source, prefix, access=access_of(s3), progress=grow)
    assert grown
    assert names_below(client, prefix) == []


def test_an_existing_bundle_is_replaced_only_when_asked(
    s3: S3Server, client: Any, prefix: str, tmp_path: Path
) -> None:
    """And then what the new one lacks is gone."""
    source = make_model(tmp_path / "hf")
    pack(source, prefix, access=access_of(s3))
    with pytest.raises(ConfigurationError, match="--overwrite"):
        pack(source, prefix, access=access_of(s3))
    (source / "tokenizer.json").unlink()
    pack(source, prefix, access=access_of(s3), key=SECRET, overwrite=True)
    assert "tokenizer.json" not in names_below(client, prefix)
    verify(prefix, access_of(s3), parse_key(SECRET))


def test_a_prefix_with_other_files_is_left_alone(
    s3: S3Server, client: Any, bucket: str, model: Path, prefix: str
) -> None:
    """Also with overwrite."""
    key = prefix.removeprefix(f"s3://{bucket}/")
    client.put_object(Bucket=bucket, Key=f"{key}/letter.txt", Body=b"dear")
    with pytest.raises(ConfigurationError, match="not a bundle"):
        pack(model, prefix, access=access_of(s3), overwrite=True)
    assert names_below(client, prefix) == ["letter.txt"]


def test_a_missing_bucket_is_said(s3: S3Server, model: Path) -> None:
    """With exit code 69."""
    with pytest.raises(SourceUnavailableError, match="no-such-bucket"):
        pack(model, "s3://no-such-bucket/m", access=access_of(s3))


def test_wrong_credentials_are_said(s3: S3Server, model: Path, prefix: str) -> None:
    """With exit code 77."""
    with pytest.raises(PermissionDeniedError):
        pack(model, prefix, access=access_of(s3, secret_access_key=Secret("wrong")))


def test_missing_credentials_are_said(
    s3: S3Server, model: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With exit code 77."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    access = access_of(s3, access_key_id=None, secret_access_key=None, region="nowhere-1")
    with pytest.raises(PermissionDeniedError, match="no AWS credentials"):
        pack(model, prefix, access=access)


def test_parts_grow_with_the_object() -> None:
    """S3 takes 10,000 parts at most; 5 TB still fit."""
    bucket = s3_upload.Bucket(None, "b", "us-east-1")
    for size in (0, 100 * MIB, 144_000 * MIB, 5 * 10**12):
        upload = s3_upload.Upload(bucket, "k", size)
        assert upload.part_bytes >= s3_upload.PART_BYTES
        assert -(-size // upload.part_bytes) <= 10_000
        upload.abort()
