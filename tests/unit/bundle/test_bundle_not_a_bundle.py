"""What is said of a URI at which there is no bundle, or not all of one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_samples import ACCESS, make_model
from manifests import rewrite
from rangeserver import RangeServer
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    TensorserveError,
)
from tensorserve.launch import preflight
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, a model; plain and sealed, its bundles; bare, a plain one without a manifest."""
    place = tmp_path_factory.mktemp("place")
    make_model(place / "hf")
    pack(place / "hf", str(place / "plain"), access=ACCESS, key=None)
    pack(place / "hf", str(place / "sealed"), access=ACCESS, key=Secret(KEY, "the test"))
    shutil.copytree(place / "plain", place / "bare")
    (place / "bare" / MANIFEST).unlink()
    return place


@pytest.fixture
def server(place: Path) -> Iterator[RangeServer]:
    """Serves all of them."""
    with RangeServer(place) as server:
        yield server


def check(uri: str, **variables: str) -> None:
    """What `tensorserve check` does with a source; the source's errors are raised."""
    environ = {f"TENSORSERVE_{name}": value for name, value in variables.items()}
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": uri, **environ})
    preflight.check_source(settings, make_plan(settings))


def refusal(uri: str, **variables: str) -> TensorserveError:
    with pytest.raises(TensorserveError) as caught:
        check(uri, **variables)
    return caught.value


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}"])
def test_a_hugging_face_directory_gets_its_pack_command(place: Path, form: str) -> None:
    """The command to copy, and not whether a volume is mounted."""
    error = refusal(form.format(place / "hf"))
    assert isinstance(error, CorruptError)
    assert "Hugging Face model, which is not a bundle" in error.message
    assert f"`tensorserve pack {place / 'hf'} {place / 'hf'}-bundle`" in str(error.hint)


def test_with_a_key_the_pack_command_encrypts(place: Path) -> None:
    """Who has a key wants no plain bundle."""
    error = refusal(str(place / "hf"), KEY=KEY.hex())
    assert "-bundle --encrypt --key-file" in str(error.hint)


def test_a_safetensors_file_is_no_bundle(place: Path) -> None:
    """The command names its directory."""
    error = refusal(str(place / "hf/model.safetensors"))
    assert "is a .safetensors file" in error.message
    assert f"pack {place / 'hf'} " in str(error.hint)


def test_a_hugging_face_directory_over_http_is_no_bundle(server: RangeServer) -> None:
    """Such a source cannot list; the usual names are asked for."""
    error = refusal(f"{server.url}/hf")
    assert "has .safetensors files" in error.message
    assert "tensorserve pack DIRECTORY DEST" in str(error.hint)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model-q4.gguf"], "has .gguf files"),
        (["pytorch_model.bin"], "has .bin files"),
        (["other.tensors"], "it has other.tensors"),
        ([], "is empty"),
    ],
)
def test_other_directories_are_said_as_what_they_are(
    tmp_path: Path, names: list[str], said: str
) -> None:
    """What pack cannot read, weights of another name, nothing."""
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert said in refusal(str(tmp_path)).message


def test_a_path_that_is_not_there_says_how_far_it_is(tmp_path: Path) -> None:
    """The part of it that is there tells a missing mount from a typing mistake."""
    error = refusal(str(tmp_path / "a/b"))
    assert f"{tmp_path}/a/b does not exist ({tmp_path} does)" in error.message


# Servers that do not say that something is missing ------------------------------------------------


def test_files_that_need_not_be_there_may_be_refused(server: RangeServer) -> None:
    """CloudFront before S3 without s3:ListBucket answers 403 for what does not exist."""
    server.missing = (403, b"<html>403 Forbidden</html>")
    check(f"{server.url}/bare")
    check(f"{server.url}/sealed", KEY=KEY.hex())
    assert any(name == f"bare/{MANIFEST}" for name, _ in server.requests)


def test_a_refused_manifest_is_no_missing_one_where_a_key_is_set(
    place: Path, server: RangeServer, tmp_path: Path
) -> None:
    """Otherwise a wrong permission would switch off what authenticates the bundle."""
    shutil.copytree(place / "sealed", tmp_path / "b")
    (tmp_path / "b" / MANIFEST).unlink()
    server.directory, server.missing = tmp_path, (403, b"")
    error = refusal(f"{server.url}/b", KEY=KEY.hex())
    assert isinstance(error, PermissionDeniedError)
    assert "With a key" in error.message
    assert "TENSORSERVE_VERIFY=hashes" in str(error.hint)
    # Said so, it is as if it were missing: our own files have no digests, and are refused.
    error = refusal(f"{server.url}/b", KEY=KEY.hex(), VERIFY="hashes")
    assert isinstance(error, CorruptError)
    error = refusal(f"{server.url}/b", KEY=KEY.hex(), VERIFY="manifest")
    assert isinstance(error, PermissionDeniedError)


def test_a_refused_manifest_is_no_missing_one_where_it_is_pinned(server: RangeServer) -> None:
    """The pin asks for that manifest."""
    server.missing = (403, b"")
    error = refusal(f"{server.url}/bare", MANIFEST_SHA256="a" * 64)
    assert isinstance(error, PermissionDeniedError)
    assert "With a pin" in error.message


def test_refused_weights_are_said_with_both_reasons(server: RangeServer) -> None:
    """No permission, or not there: the server does not say which."""
    server.missing = (403, b"")
    error = refusal(f"{server.url}/nowhere")
    assert isinstance(error, PermissionDeniedError)
    assert "some servers answer so for missing files" in error.message
    assert "Check the path" in str(error.hint)


@pytest.mark.parametrize("status", [404, 410])
def test_both_statuses_of_what_is_gone_are_missing(server: RangeServer, status: int) -> None:
    """404, and 410 where it once was."""
    server.missing = (status, b"")
    check(f"{server.url}/bare")


@pytest.mark.parametrize("status", [400, 401])
def test_other_statuses_are_not_taken_for_missing(server: RangeServer, status: int) -> None:
    """A mistake in the request and a question for credentials are said as such."""
    server.missing = (status, b"")
    error = refusal(f"{server.url}/bare")
    assert error.exit_code == {400: 69, 401: 77}[status]
    assert str(status) in error.message


@pytest.mark.parametrize("key", ["", KEY.hex()])
def test_a_web_page_for_what_is_missing_is_noticed(server: RangeServer, key: str) -> None:
    """A single-page application's server answers everything with 200."""
    server.missing = (200, b"\n<!DOCTYPE html><html>app</html>")
    error = refusal(f"{server.url}/bare", KEY=key)
    assert isinstance(error, CorruptError)
    assert f"{MANIFEST} is a web page" in error.message
    check(f"{server.url}/plain")


def test_a_web_page_instead_of_the_configuration_is_noticed(
    place: Path, server: RangeServer, tmp_path: Path
) -> None:
    """vLLM would fail with a JSON error after its imports."""
    shutil.copytree(place / "bare", tmp_path / "b")
    (tmp_path / "b/config.json").write_text("<html></html>")
    server.directory = tmp_path
    assert "config.json is a web page" in refusal(f"{server.url}/b").message


def shared_among_ranks(place: Path, target: Path) -> None:
    """The plain bundle with a file for each of two ranks; its manifest, which is not authenticated,
    names both."""
    shutil.copytree(place / "plain", target)
    shutil.copy(target / "model.tensors", target / "model-rank-001.tensors")
    (target / "model.tensors").rename(target / "model-rank-000.tensors")

    def rename(document: dict[str, Any]) -> None:
        (entry,) = document["tensors_files"].values()
        document["tensors_files"] = {f"model-rank-00{rank}.tensors": entry for rank in range(2)}

    rewrite(target, rename)


@pytest.mark.parametrize("status", [404, 403, 500])
def test_a_manifest_that_names_rank_files_is_believed(
    place: Path, server: RangeServer, tmp_path: Path, status: int
) -> None:
    """Whatever the server says of model.tensors: it is not asked for."""
    shared_among_ranks(place, tmp_path / "b")
    server.directory, server.missing = tmp_path, (status, b"")
    check(f"{server.url}/b", VLLM_TENSOR_PARALLEL_SIZE="2")
    assert not any(name.endswith("/model.tensors") for name, _ in server.requests)
    assert not any("rank-002" in name for name, _ in server.requests)
    error = refusal(f"{server.url}/b", VLLM_TENSOR_PARALLEL_SIZE="4")
    assert "2 shards by its manifest.json, not 4" in error.message


def test_without_a_manifest_a_refused_file_may_be_for_ranks(
    place: Path, server: RangeServer, tmp_path: Path
) -> None:
    """model.tensors is refused, the ranks' files are there, and one more of them is refused."""
    shared_among_ranks(place, tmp_path / "b")
    (tmp_path / "b" / MANIFEST).unlink()
    server.directory, server.missing = tmp_path, (403, b"")
    check(f"{server.url}/b", VLLM_TENSOR_PARALLEL_SIZE="2")


# Presigned URLs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bundle", ["sealed", "plain"])
def test_a_url_signed_for_the_weights_alone_is_said(
    place: Path, tmp_path: Path, bundle: str
) -> None:
    """All else is refused: what is missing, and what to give instead."""
    (tmp_path / "b").mkdir()
    shutil.copy(place / bundle / "model.tensors", tmp_path / "b")
    with RangeServer(tmp_path) as server:
        server.missing = (403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
        key = KEY.hex() if bundle == "sealed" else ""
        error = refusal(f"{server.url}/b/model.tensors?X-Amz-Signature=canary", KEY=key)
    assert isinstance(error, ConfigurationError)
    assert "the signature in the URL opens this file alone" in error.message
    assert "s3://bucket/prefix with credentials" in str(error.hint)
    assert "canary" not in str(error)


def test_a_signed_url_that_expired_is_refused_as_such(server: RangeServer) -> None:
    """Where the weights are refused as well, the signature is at fault."""
    server.missing = (403, b"")
    error = refusal(f"{server.url}/no/model.tensors?X-Amz-Signature=canary", KEY=KEY.hex())
    assert isinstance(error, PermissionDeniedError)
    assert "presigned URL has expired" in str(error.hint)
    assert "canary" not in str(error)
