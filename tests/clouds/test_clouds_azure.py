"""az:// against Azurite, Microsoft's emulator: each kind of credentials (`make test-clouds`)."""

from __future__ import annotations

import base64
import hmac
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from azure_blobs import make_container, put_blob
from certificates import PrivateCA
from cloud_servers import ACCOUNT, KEY, Azurite, azurite
from faultserver import Asked, FaultServer, Reply
from tensorserve.errors import PermissionDeniedError, SourceUnavailableError
from tensorserve.secret import Secret
from tensorserve.sources import (
    Access,
    AzureAccess,
    NotFoundError,
    RetryPolicy,
    list_names,
    open_source,
)

POLICY = RetryPolicy(attempts=3, deadline=10, backoff_base=0.01)
DATA = os.urandom(300_000)


@pytest.fixture(scope="module")
def server() -> Iterator[Azurite]:
    with azurite() as running:
        fill(owner(running))
        yield running


def owner(server: Azurite) -> Access:
    return Access(azure=server.access, policy=POLICY)


def fill(access: Access) -> None:
    make_container("models", access)
    put_blob("az://models/m/model.tensors", DATA, access)


@pytest.mark.parametrize("name", ["m/x", "m/with space & plus+.bin", "m/ümlaut", "m/a?b#c%41"])
def test_names_are_signed_as_they_are_sent(server: Azurite, name: str) -> None:
    """Read and listed."""
    put_blob(f"az://models/{name}", DATA, owner(server))
    source = open_source(f"az://models/{name}", owner(server))
    assert source.read(100_001, 150_000) == DATA[100_001:250_001]
    assert list_names("az://models/m", owner(server))[name.removeprefix("m/")] == len(DATA)  # type: ignore[index]


def test_an_empty_blob_is_opened(server: Azurite) -> None:
    """Azurite answers 416, as Azure does."""
    put_blob("az://models/empty", b"", owner(server))
    assert open_source("az://models/empty", owner(server)).size == 0


def test_what_is_not_there_is_said(server: Azurite) -> None:
    """65 for a blob, 69 for a container."""
    with pytest.raises(NotFoundError, match="az://models/none"):
        open_source("az://models/none", owner(server))
    for act in (open_source, list_names):
        with pytest.raises(SourceUnavailableError, match="'no-such'"):
            act("az://no-such/none", owner(server))


def test_a_wrong_key_is_a_matter_of_permission(server: Azurite) -> None:
    """77, with Azurite's words."""
    wrong = base64.b64encode(b"wrong").decode()
    text = f"AccountName={ACCOUNT};AccountKey={wrong};BlobEndpoint={server.endpoint}"
    access = Access(azure=AzureAccess(connection_string=Secret(text)), policy=POLICY)
    with pytest.raises(PermissionDeniedError, match="AuthorizationFailure"):
        open_source("az://models/m/model.tensors", access)


def signature(permissions: str, seconds: int) -> str:
    """A SAS for the container `models`, as Microsoft describes it from version 2020-12-06 on."""
    version = "2020-12-06"
    end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
    signed = [permissions, "", end, f"/blob/{ACCOUNT}/models", "", "", "", version, "c", *[""] * 7]
    digest = hmac.digest(base64.b64decode(KEY), "\n".join(signed).encode(), "sha256")
    parts = {"sp": permissions, "se": end, "sv": version, "sr": "c"}
    return urlencode(parts | {"sig": base64.b64encode(digest).decode()})


def test_a_sas_is_let_in_for_what_it_allows(server: Azurite) -> None:
    """Read and list; one that has expired is said; one without w writes nothing."""

    def access(sas: str) -> Access:
        text = f"AccountName={ACCOUNT};BlobEndpoint={server.endpoint};SharedAccessSignature={sas}"
        return Access(azure=AzureAccess(connection_string=Secret(text)), policy=POLICY)

    good = access(signature("rl", 600))
    source = open_source("az://models/m/model.tensors", good)
    assert source.read(100_001, 150_000) == DATA[100_001:250_001]
    assert list_names("az://models/m", good)
    for refused in (access(signature("rl", -600)), access(signature("w", 600))):
        with pytest.raises(PermissionDeniedError, match=r"Authorization|Authentication") as caught:
            open_source("az://models/m/model.tensors", refused)
        assert "sig=" not in str(caught.value)
    with pytest.raises(PermissionDeniedError, match=r"Authorization|Authentication"):
        put_blob("az://models/other", b"x", good)


def test_an_identity_of_azure_identity_is_let_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """DefaultAzureCredential's token, from a managed identity's endpoint of ours, over https.

    Azurite looks at the token's claims.
    """
    now = int(time.time())
    claims = {
        "aud": "https://storage.azure.com",
        "iss": "https://sts.windows.net/ab1f708d-50f6-404c-a006-d71b2ac7a606/",
        "iat": now - 60,
        "nbf": now - 60,
        "exp": now + 36_000,
    }
    parts = [{"typ": "JWT", "alg": "RS256"}, claims]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode() for part in parts]
    token = ".".join(part.rstrip("=") for part in [*encoded, "c2ln"])

    def issue(_: Asked) -> Reply:
        document = {"access_token": token, "expires_on": str(now + 36_000)}
        document |= {"resource": "https://storage.azure.com", "token_type": "Bearer"}
        return Reply(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    ca = PrivateCA(tmp_path)
    pem = str(ca.certificate())
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.bundle))
    with (
        FaultServer(issue) as endpoint,
        azurite("--oauth", "basic", "--cert", pem, "--key", pem, scheme="https") as server,
    ):
        monkeypatch.setenv("IDENTITY_ENDPOINT", endpoint.url)
        monkeypatch.setenv("IDENTITY_HEADER", "x")
        monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "prod")
        fill(owner(server))
        text = f"AccountName={ACCOUNT};BlobEndpoint={server.endpoint}"
        access = Access(azure=AzureAccess(connection_string=Secret(text)), policy=POLICY)
        source = open_source("az://models/m/model.tensors", access)
        assert source.read(100_001, 150_000) == DATA[100_001:250_001]
        assert list_names("az://models/m", access) == {"model.tensors": len(DATA)}
        assert endpoint.requests
