"""gs://: against a real fake-gcs-server, and what Google answers as its reference has it.

fake-gcs-server knows no credentials and no preconditions. Tokens are google-auth's own, from a
token service of ours; refusals are documents as in Google's reference. Not tried: Google itself.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from cloud_servers import GcsServer, gcs_server
from faultserver import Asked, FaultServer, Reply
from rangeserver import RangeServer
from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
    TensorserveError,
)
from tensorserve.sources import (
    Access,
    ForbiddenError,
    GcsAccess,
    NotFoundError,
    RetryPolicy,
    gcs_account,
    list_names,
    open_source,
)
from tensorserve.sources.gcs_uri import split_gs

POLICY = RetryPolicy(attempts=3, deadline=5, backoff_base=0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[GcsServer]:
    with gcs_server() as running:
        running.make_bucket("models")
        yield running


def access_of(server: GcsServer) -> Access:
    return Access(gcs=server.access, policy=POLICY)


@pytest.mark.parametrize(
    "name", ["m/model.tensors", "m/with space & plus+.bin", "m/ümlaut", "m/a?b#c%41"]
)
def test_an_object_is_read_by_ranges(server: GcsServer, name: str) -> None:
    """Names that need quoting too."""
    data = os.urandom(300_000)
    server.put("models", name, data)
    source = open_source(f"gs://models/{name}", access_of(server))
    assert source.size == len(data)
    assert source.version
    assert source.read(100_001, 150_000) == data[100_001:250_001]


def test_a_prefix_is_listed_page_by_page(server: GcsServer) -> None:
    """Relative to the prefix, and not beyond it. The pages are ours: the server gives one."""
    for name in ("bundle/config.json", "bundle/sub/x", "bundle2/y"):
        server.put("models", name, b"abc")
    assert list_names("gs://models/bundle", access_of(server)) == {"config.json": 3, "sub/x": 3}
    pages = {
        "": {"items": [{"name": "b/one", "size": "1"}], "nextPageToken": "t&2"},
        "t%262": {"items": [{"name": "b/two", "size": "2"}, {"name": "b/sub/", "size": "0"}]},
    }

    def answer(asked: Asked) -> Reply:
        token = asked.path.partition("pageToken=")[2]
        return Reply(200, {}, json.dumps(pages[token]).encode())

    with FaultServer(answer) as front:
        access = Access(gcs=GcsAccess(emulator_host=front.url), policy=POLICY)
        assert list_names("gs://models/b/", access) == {"one": 1, "two": 2}


def test_what_is_not_there_is_said(server: GcsServer) -> None:
    """65 for an object, 69 for a bucket."""
    with pytest.raises(NotFoundError, match="gs://models/nothing"):
        open_source("gs://models/nothing", access_of(server))
    with pytest.raises(SourceUnavailableError, match="'no-such-bucket'"):
        list_names("gs://no-such-bucket/m", access_of(server))


def test_an_emulator_needs_no_scheme_and_gets_no_credentials(server: GcsServer) -> None:
    """As with Google's own libraries."""
    server.put("models", "bare", b"abc")
    host = server.url.removeprefix("http://")
    access = Access(gcs=GcsAccess(emulator_host=host), policy=POLICY)
    assert open_source("gs://models/bare", access).read(0, 3) == b"abc"


# Credentials -------------------------------------------------------------------------------------


def key_file(path: Path, token_uri: str) -> Path:
    """A service account's key, whose tokens come from `token_uri`."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    document = {
        "type": "service_account",
        "client_email": "a@project.iam.gserviceaccount.com",
        "private_key": pem.decode(),
        "private_key_id": "1",
        "token_uri": token_uri,
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`storage(url)`: Google's storage is there, and wants credentials."""
    for name in ("GOOGLE_CLOUD_QUOTA_PROJECT", "GOOGLE_CLOUD_PROJECT", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gcs_account.account_for, "_accounts", {})

    def there(url: str, **given: Any) -> Access:
        access = GcsAccess(**given)
        gcs_account.account_for(access).base = url
        return Access(gcs=access, policy=POLICY)

    return there


def tokens(issued: list[str]) -> FaultServer:
    """A token service: t1, t2, …"""

    def answer(_: Asked) -> Reply:
        issued.append(f"t{len(issued) + 1}")
        token = {"access_token": issued[-1], "expires_in": 3600, "token_type": "Bearer"}
        return Reply(200, {"Content-Type": "application/json"}, json.dumps(token).encode())

    return FaultServer(answer)


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[RangeServer]:
    """The object `m` of the bucket `bucket`, without credentials."""
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "m").write_bytes(bytes(200_000))
    with RangeServer(tmp_path) as server:
        yield server


def test_a_service_accounts_token_goes_to_the_storage_alone(
    storage: Any, upstream: RangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """google-auth gets it from the file's token_uri; where a redirect leads, it is not seen."""
    issued: list[str] = []
    away = Reply(307, {"Location": f"{upstream.url}/bucket/m"}, label="away")
    with tokens(issued) as service, FaultServer(lambda _: away) as front:
        file = key_file(tmp_path / "key.json", f"{service.url}/token")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", "payer")
        source = open_source("gs://bucket/m", storage(front.url))
        assert source.read(100_000, 10) == bytes(10)
    asked = {name.lower(): value for name, value in front.requests[-1].headers.items()}
    assert asked["authorization"] == "Bearer t1"
    assert asked["x-goog-user-project"] == "payer"
    assert issued == ["t1"]
    for _, headers in upstream.requests:
        assert not {"authorization", "x-goog-user-project"} & {h.lower() for h in headers}


def test_a_token_that_is_refused_in_the_middle_is_renewed_once(
    storage: Any, upstream: RangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """F5: 401, whatever its expiry says; then the range goes on."""
    issued: list[str] = []

    def answer(asked: Asked) -> Reply | None:
        given = {name.lower(): value for name, value in asked.headers.items()}
        stale = asked.number > 0 and given["authorization"] == "Bearer t1"
        return Reply(401, {}, _document("AuthenticationRequired"), label="stale") if stale else None

    with tokens(issued) as service, FaultServer(answer, upstream=upstream.url) as front:
        file = key_file(tmp_path / "key.json", f"{service.url}/token")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        source = open_source("gs://bucket/m", storage(front.url))
        assert source.read(100_000, 10) == bytes(10)
        assert source.read(150_000, 10) == bytes(10)
    assert issued == ["t1", "t2"]
    assert front.fired["stale"] == 1


def test_a_metadata_server_gives_tokens_and_no_models(
    storage: Any, upstream: RangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """google-auth asks it, as on a machine of Google's; the SSRF guard is for model data."""
    token = {"access_token": "from-metadata", "expires_in": 3600, "token_type": "Bearer"}
    account = {"default": {"email": "a@p", "scopes": ["x"], "aliases": ["default"]}}

    def metadata(asked: Asked) -> Reply:
        said: object = "project"
        if "/token" in asked.path:
            said = token
        elif "service-accounts" in asked.path:
            said = account["default"]
        text = said if isinstance(said, str) else json.dumps(said)
        kind = "text/plain" if isinstance(said, str) else "application/json"
        return Reply(200, {"Metadata-Flavor": "Google", "Content-Type": kind}, text.encode())

    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "none"))
    with (
        FaultServer(metadata) as server,
        FaultServer(lambda _: None, upstream=upstream.url) as front,
    ):
        host = server.url.removeprefix("http://")
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        monkeypatch.setenv("GCE_METADATA_IP", host)
        # Read when google-auth is imported.
        for name in ("_GCE_METADATA_HOST", "_METADATA_ROOT", "_METADATA_IP_ROOT"):
            monkeypatch.setattr(
                f"google.auth.compute_engine._metadata.{name}",
                host if name == "_GCE_METADATA_HOST" else f"http://{host}/computeMetadata/v1/",
                raising=False,
            )
        source = open_source("gs://bucket/m", storage(front.url))
        assert source.size == 200_000
    given = {name.lower(): value for name, value in front.requests[0].headers.items()}
    assert given["authorization"] == "Bearer from-metadata"


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (None, ConfigurationError, "GOOGLE_APPLICATION_CREDENTIALS=.*gives no credentials"),
        ("{", ConfigurationError, "GOOGLE_APPLICATION_CREDENTIALS"),
        ("{}", ConfigurationError, "GOOGLE_APPLICATION_CREDENTIALS"),
        ('{"type": "service_account"}', ConfigurationError, "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_a_file_that_is_no_credentials_is_named(
    storage: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str | None,
    kind: type[TensorserveError],
    said: str,
) -> None:
    """78, not google-auth's exception."""
    file = tmp_path / "key.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    with pytest.raises(kind, match=said):
        open_source("gs://bucket/m", storage("http://127.0.0.1:9"))


def test_no_credentials_name_the_ways(
    storage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """77."""
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(PermissionDeniedError, match="TENSORSERVE_GCS_UNSIGNED"):
        open_source("gs://bucket/m", storage("http://127.0.0.1:9"))


def test_a_token_service_that_refuses_is_a_matter_of_permission(
    storage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """77, with its reason; one that is away is waited for (69)."""
    refusal = Reply(400, {}, b'{"error": "invalid_grant", "error_description": "no such key"}')
    with FaultServer(lambda _: refusal) as service:
        file = key_file(tmp_path / "key.json", f"{service.url}/token")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        with pytest.raises(PermissionDeniedError, match="invalid_grant"):
            open_source("gs://bucket/m", storage("http://127.0.0.1:9"))
    with pytest.raises(SourceUnavailableError, match="token service cannot be reached"):
        open_source("gs://bucket/m", storage("http://127.0.0.1:9"))


def test_a_missing_library_names_the_command(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """78; public buckets need none."""
    monkeypatch.setitem(sys.modules, "google.auth", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'tensorserve\[gcs\]'"):
        open_source("gs://bucket/m", storage("http://127.0.0.1:9"))


# Refusals ----------------------------------------------------------------------------------------


def _document(code: str, message: str = "canary-free") -> bytes:
    text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return f"<?xml version='1.0' encoding='UTF-8'?>{text}".encode()


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (404, "NoSuchBucket", SourceUnavailableError, "The bucket 'bucket' does not exist"),
        (404, "NoSuchKey", NotFoundError, "gs://bucket/m does not exist"),
        (403, "AccessDenied", ForbiddenError, "without credentials"),
        (401, "AuthenticationRequired", ForbiddenError, "without credentials"),
        (400, "UserProjectMissing", PermissionDeniedError, "GOOGLE_CLOUD_QUOTA_PROJECT"),
        (400, "InvalidBucketName", ConfigurationError, "not a valid bucket name"),
        (403, "UserProjectAccountProblem", PermissionDeniedError, "billing is disabled"),
        (400, "ResourceIsEncryptedWithCustomerEncryptionKey", ConfigurationError, "CSEK"),
        (429, "SlowDown", SourceUnavailableError, "answers 429"),
        (503, "ServiceUnavailable", SourceUnavailableError, "answers 503"),
    ],
)
def test_refusals_of_reads(
    storage: Any, status: int, code: str, kind: type[TensorserveError], said: str
) -> None:
    """Codes of Google's XML API."""
    reply = Reply(status, {}, _document(code))
    with FaultServer(lambda _: reply) as server, pytest.raises(kind, match=said):
        open_source("gs://bucket/m", storage(server.url, unsigned=True))
    assert server.fired[str(status)] == (3 if status in {429, 503} else 1)


@pytest.mark.parametrize(
    ("status", "reason", "kind", "said"),
    [
        (404, "notFound", SourceUnavailableError, "The bucket 'bucket' does not exist"),
        (403, "forbidden", ForbiddenError, "without credentials"),
        (401, "required", ForbiddenError, "without credentials"),
        (400, "userProjectMissing", PermissionDeniedError, "GOOGLE_CLOUD_QUOTA_PROJECT"),
        (503, "backendError", SourceUnavailableError, "answers 503"),
    ],
)
def test_refusals_of_listings(
    storage: Any, status: int, reason: str, kind: type[TensorserveError], said: str
) -> None:
    """Reasons of Google's JSON API."""
    error = {"code": status, "message": "no", "errors": [{"reason": reason}]}
    reply = Reply(status, {}, json.dumps({"error": error}).encode())
    with FaultServer(lambda _: reply) as server, pytest.raises(kind, match=said):
        list_names("gs://bucket/m", storage(server.url, unsigned=True))


def test_a_denial_names_the_role(
    storage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Google's own words say who asked for what."""
    words = "a@p does not have storage.objects.get access"
    denied = Reply(403, {}, _document("AccessDenied", words))
    with tokens([]) as service, FaultServer(lambda _: denied) as front:
        file = key_file(tmp_path / "key.json", f"{service.url}/token")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        with pytest.raises(ForbiddenError, match=words) as caught:
            open_source("gs://bucket/m", storage(front.url))
    assert "roles/storage.objectViewer" in str(caught.value)


def test_an_answer_that_is_no_listing_is_said(storage: Any) -> None:
    """A captive portal's page."""
    with (
        FaultServer(lambda _: Reply(200, {}, b"<html>")) as server,
        pytest.raises(SourceUnavailableError, match="not Google's"),
    ):
        list_names("gs://bucket/m", storage(server.url, unsigned=True))


@pytest.mark.parametrize("uri", ["gs://", "gs:///m", "gs://B/m", "gs://u:p@b/m", "gs://b?c/m"])
def test_what_names_no_bucket_is_refused(uri: str) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigurationError, match="not the name of a bucket"):
        split_gs(uri)
