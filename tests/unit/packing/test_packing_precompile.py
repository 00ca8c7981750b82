"""`precompile` before an engine runs: what it is given, and what is refused in time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from s3server import S3Server
from safetensors.torch import save_file

from s3_clients import s3_access, s3_client
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, TensorserveError, WrongKeyError
from tensorserve.launch.compile_fingerprint import flags, variables
from tensorserve.packing import precompile as module
from tensorserve.packing.destination import add_file
from tensorserve.packing.pack import pack
from tensorserve.packing.precompile import job_environment, precompile
from tensorserve.secret import Secret
from tensorserve.sources import Access
from tensorserve.telemetry import EventLog, events_path
from tensorserve.telemetry.schema import CompiledCacheKnown

KEY = bytes(range(32))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return packed(tmp_path, KEY)


def packed(directory: Path, key: bytes | None) -> Path:
    model = directory / "hf"
    model.mkdir()
    save_file({"norm.weight": torch.ones(16)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    secret = None if key is None else Secret(key, "the test")
    pack(model, str(directory / "bundle"), access=Access(), key=secret)
    return directory / "bundle"


def refused(uri: object, environ: dict[str, str], sign_key: Path | None = None) -> str:
    """What is said before an engine would be started."""
    with pytest.raises(ConfigurationError) as caught:
        precompile(str(uri), environ, (), sign_key)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(module.subprocess, "Popen", started)


def test_a_plain_bundle_needs_a_key_of_its_own(tmp_path: Path) -> None:
    """Whoever can write it could write code."""
    said = refused(packed(tmp_path, None), {})
    assert "not encrypted" in said
    assert "TENSORSERVE_COMPILED_KEY_FILE" in said
    with pytest.raises(AssertionError, match="an engine was started"):
        precompile(str(tmp_path / "bundle"), {"TENSORSERVE_COMPILED_KEY": KEY.hex()}, (), None)


def test_a_bundle_without_a_manifest_is_signed_first(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    assert "tensorserve sign" in refused(bundle, {"TENSORSERVE_KEY": KEY.hex()})


def test_without_the_models_key_nothing_is_sealed(bundle: Path) -> None:
    """Nor with another one."""
    assert "authenticated manifest" in refused(bundle, {})
    with pytest.raises(TensorserveError) as caught:
        precompile(str(bundle), {"TENSORSERVE_KEY": "11" * 32}, (), None)
    assert caught.value.exit_code == WrongKeyError.exit_code


def test_places_that_cannot_be_written(bundle: Path) -> None:
    """Before minutes of compiling."""
    assert "cannot be written" in refused("https://host/bundle", {})
    assert "whole bundle" in refused(bundle / "model.tensors", {})


def test_a_bad_sign_key(bundle: Path, tmp_path: Path) -> None:
    environ = {"TENSORSERVE_KEY": KEY.hex()}
    assert "cannot be read" in refused(bundle, environ, tmp_path / "missing")
    (tmp_path / "bad").write_text("no key")
    assert "not an Ed25519 private key" in refused(bundle, environ, tmp_path / "bad")


def test_the_engine_is_the_users_own(tmp_path: Path) -> None:
    """The same flags and variables, but for where its API listens: the same fingerprint."""
    environ = {
        "TENSORSERVE_MODEL_URI": "/other",
        "TENSORSERVE_PORT": "80",
        "TENSORSERVE_VLLM_MAX_MODEL_LEN": "512",
        "TENSORSERVE_VLLM_API_KEY": "secret",
        "TENSORSERVE_VLLM_SSL_KEYFILE": "/k",
        "TENSORSERVE_VLLM_SSL_CERTFILE": "/c",
        "TENSORSERVE_COMPILED": "required",
        "VLLM_API_KEY": "secret",
        "VLLM_USE_AOT_COMPILE": "1",
        "PATH": "/bin",
    }
    words = (
        "--port",
        "81",
        "--host=0.0.0.0",
        "--uds",
        "/s",
        "--dtype",
        "float16",
        "--api-key",
        "x",
    )
    given, left = job_environment(environ, words, "s3://bucket/model", tmp_path)
    settings = Settings.from_environment(given)
    plan = make_plan(settings, left)
    assert settings.model_uri == "s3://bucket/model"
    assert settings.compiled == "compiling"
    # Hundreds of requests, and a line for each.
    assert "--disable-uvicorn-access-log" in plan.arguments.words()
    assert (plan.host, plan.port) == ("127.0.0.1", settings.port)
    assert settings.port not in {80, 81, settings.metrics_port}
    assert plan.secret_flags == ()
    assert plan.health_url.startswith("http://127.0.0.1:")
    server = make_plan(
        Settings.from_environment(
            environ | {"TENSORSERVE_MODEL_URI": "s3://bucket/model", "VLLM_API_KEY": ""}
        ),
        ("--dtype", "float16"),
    )
    assert flags(plan.arguments, plan.model_dir) == flags(server.arguments, server.model_dir)
    assert variables(dict(plan.environment)) == variables(dict(server.environment))


def test_an_engine_that_ends_gives_its_code(tmp_path: Path) -> None:
    """What was wrong with the settings is in its output."""
    with pytest.raises(TensorserveError, match="code 78") as caught:
        module._wait_ready(_Ended(78), tmp_path)  # type: ignore[arg-type]
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(("result", "left"), [("compiling", False), ("kept", True)])
def test_the_jobs_caches_are_removed_whatever_happens(
    tmp_path: Path, result: str, left: bool
) -> None:
    """Else the next job would find them. Those of a server are none of its own."""
    (tmp_path / "place/vllm").mkdir(parents=True)
    log = EventLog(events_path(tmp_path))
    log.emit(CompiledCacheKnown(result, "5e" * 32, str(tmp_path / "place/vllm")))
    with pytest.raises(TensorserveError), module._removing_caches(tmp_path):
        raise TensorserveError("the engine ended")
    assert (tmp_path / "place").exists() == left
    with module._removing_caches(tmp_path / "no log"):
        assert not (tmp_path / "no log").exists()


class _Ended:
    def __init__(self, code: int) -> None:
        self._code = code

    def poll(self) -> int:
        return self._code


class TestAddFile:
    """A file in a folder of a bundle, in one step."""

    def test_of_a_directory(self, bundle: Path) -> None:
        add_file(str(bundle), "compiled/a.sealed", io.BytesIO(b"one"), Access())
        file = io.BytesIO(b"two" * 999_999)
        file.seek(5)
        add_file(f"file://{bundle}", "compiled/a.sealed", file, Access())
        assert (bundle / "compiled/a.sealed").read_bytes() == b"two" * 999_999
        assert [path.name for path in (bundle / "compiled").iterdir()] == ["a.sealed"]

    def test_of_a_directory_that_cannot_be_written(self, bundle: Path) -> None:
        (bundle / "compiled").write_text("a file")
        with pytest.raises(ConfigurationError, match="compiled"):
            add_file(str(bundle), "compiled/a.sealed", io.BytesIO(b"one"), Access())

    def test_of_a_bucket(self, s3: S3Server, bucket: str) -> None:
        """Also one of several parts."""
        access = Access(s3=s3_access(s3))
        for size in (3, 17 * 1024**2):
            data = bytes(size)
            add_file(f"s3://{bucket}/precompile", "compiled/a.sealed", io.BytesIO(data), access)
            key = "precompile/compiled/a.sealed"
            found = s3_client(s3).get_object(Bucket=bucket, Key=key)["Body"].read()
            assert found == data
