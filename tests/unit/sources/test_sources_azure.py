"""az://: signatures as azure-storage-blob makes them, refusals as Azurite and Azure's reference do.

The signatures were recorded from azure-storage-blob 12.31.1, the answers from Azurite 3.37.0.
tests/clouds asks Azurite itself (`make test-clouds`). Not tried: Azure itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_servers import KEY
from faultserver import Asked, FaultServer, Reply
from rangeserver import RangeServer
from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
    TensorserveError,
)
from tensorserve.secret import Secret
from tensorserve.sources import (
    Access,
    AzureAccess,
    ForbiddenError,
    NotFoundError,
    RetryPolicy,
    azure_account,
    list_names,
    open_source,
)
from tensorserve.sources.azure_account import AzureAccount
from tensorserve.sources.azure_uri import split_az

POLICY = RetryPolicy(attempts=3, deadline=5, backoff_base=0.01)
HOST = "https://myaccount.blob.core.windows.net"
LISTING = f"{HOST}/models?restype=container&comp=list&prefix=m%20x%2F&maxresults=1000"
BLOCK = f"{HOST}/models/m/x?comp=block&blockid=MDAwMQ%3D%3D"


@pytest.mark.parametrize(
    ("method", "url", "headers", "length", "signature"),
    [
        (
            *("GET", f"{HOST}/models/m/model.tensors", {"x-ms-range": "bytes=0-65535"}, 0),
            "r77OcQaB290E0GHWy451e82CQo0N6synHICE5aQwBrs=",
        ),
        (
            *("GET", f"{HOST}/models/m/a%20b%2Bc%C3%BC"),
            *({"x-ms-range": "bytes=5-9", "If-Match": '"0x1"'}, 0),
            "hMsIVOHIqVwRds8i0Wu08jQTToK5JX4FcQuwQOVNf0k=",
        ),
        ("GET", LISTING, {}, 0, "77JWehnmL2qCzJsIdmuWMQszrrszmHs69bBFRPE/Nak="),
        (
            *("PUT", BLOCK),
            {"x-ms-blob-content-type": "application/octet-stream", "Content-Type": "text/plain"},
            *(3, "X1rJiqkitCOCD6IfOsz5/eLDl48A7E80pxFP8zeH6Eg="),
        ),
    ],
)
def test_a_signature_is_that_of_azures_own_library(
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    url: str,
    headers: dict[str, str],
    length: int,
    signature: str,
) -> None:
    """The same key, request and date. It asks for ranges by a header of Azure's own."""
    monkeypatch.setattr(azure_account, "formatdate", lambda **_: "Mon, 30 Nov 2026 17:00:00 GMT")
    account = AzureAccount(AzureAccess("myaccount", account_key=Secret(KEY)))
    signed = account.authorized(method, url, headers, length)
    assert signed["Authorization"] == f"SharedKey myaccount:{signature}"


@pytest.fixture(autouse=True)
def fresh_accounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account of another test, nor of this machine's user."""
    monkeypatch.setattr(azure_account.account_for, "_accounts", {})
    monkeypatch.setenv("AZURE_CONFIG_DIR", str(tmp_path))
    # Not the command lines of developers, each of which is a process that takes seconds.
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "prod")


def access_of(url: str, **given: str) -> Access:
    """An account behind `url`, path-style as an emulator's."""
    text = f"AccountName=acc;BlobEndpoint={url}/acc;"
    secrets = {name: Secret(value, name) for name, value in given.items()}
    return Access(
        azure=AzureAccess(connection_string=Secret(text, "a test"), **secrets), policy=POLICY
    )


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[RangeServer]:
    """The blob `m` of the container `cont`, without credentials."""
    (tmp_path / "acc" / "cont").mkdir(parents=True)
    (tmp_path / "acc" / "cont" / "m").write_bytes(bytes(200_000))
    with RangeServer(tmp_path) as server:
        yield server


def test_a_sas_goes_into_the_query_and_into_no_message(upstream: RangeServer) -> None:
    """With or without its question mark."""
    for given in ("?sv=1&sig=canary%2B", "sv=1&sig=canary%2B"):
        with FaultServer(lambda _: None, upstream=upstream.url) as front:
            access = access_of(front.url, sas_token=given)
            source = open_source("az://cont/m", access)
            assert source.size == 200_000
            assert source.name == "az://cont/m"
            with pytest.raises(NotFoundError) as caught:
                open_source("az://cont/none", access)
        assert front.requests[0].path == "/acc/cont/m?sv=1&sig=canary%2B"
        assert "Authorization" not in front.requests[0].headers
        assert "canary" not in str(caught.value)


def identity(monkeypatch: pytest.MonkeyPatch, issued: list[str]) -> FaultServer:
    """A managed identity's endpoint, as App Service and Container Apps have it: t1, t2, …"""

    def answer(asked: Asked) -> Reply:
        assert asked.headers["X-IDENTITY-HEADER"] == "canary"
        issued.append(f"t{len(issued) + 1}")
        token = {"access_token": issued[-1], "expires_on": str(int(time.time()) + 36000)}
        token |= {"resource": "https://storage.azure.com", "token_type": "Bearer"}
        return Reply(200, {"Content-Type": "application/json"}, json.dumps(token).encode())

    server = FaultServer(answer)
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{server.url}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", "canary")
    return server


def test_an_identitys_token_is_renewed_once_where_it_is_refused(
    upstream: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5, with azure-identity itself; 401 with Azure's code."""
    issued: list[str] = []

    def answer(asked: Asked) -> Reply | None:
        stale = asked.number > 0 and asked.headers["Authorization"] == "Bearer t1"
        headers = {"x-ms-error-code": "InvalidAuthenticationInfo"}
        return Reply(401, headers, label="stale") if stale else None

    with identity(monkeypatch, issued), FaultServer(answer, upstream=upstream.url) as front:
        source = open_source("az://cont/m", access_of(front.url))
        assert source.read(100_000, 10) == bytes(10)
        assert source.read(150_000, 10) == bytes(10)
    assert issued == ["t1", "t2"]
    assert front.fired["stale"] == 1
    assert front.requests[0].headers["x-ms-version"]


def test_a_token_goes_to_no_other_host(
    upstream: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor over plain http but on this machine."""
    away = Reply(307, {"Location": f"{upstream.url}/acc/cont/m"})
    with identity(monkeypatch, []), FaultServer(lambda _: away) as front:
        assert open_source("az://cont/m", access_of(front.url)).read(100_000, 1) == b"\0"
    assert not any("Authorization" in headers for _, headers in upstream.requests)
    with pytest.raises(ConfigurationError, match="plain http"):
        open_source("az://cont/m", access_of("http://192.0.2.1"))


def test_no_credentials_name_the_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """77, not azure-identity's exception."""
    for name in ("IDENTITY_ENDPOINT", "IDENTITY_HEADER", "AZURE_CLIENT_ID", "AZURE_TENANT_ID"):
        monkeypatch.delenv(name, raising=False)
    # The machine's metadata service, which is not there.
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", "http://127.0.0.1:9")
    with pytest.raises(PermissionDeniedError, match="AZURE_STORAGE_KEY"):
        open_source("az://cont/m", access_of("http://127.0.0.1:9"))


def test_a_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """78; a key and a SAS need none."""
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'tensorserve\[azure\]'"):
        open_source("az://cont/m", access_of("http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("access", "said"),
    [
        (AzureAccess(), "AZURE_STORAGE_ACCOUNT"),
        (AzureAccess("acc.blob.core.windows.net"), "is not the name of a storage account"),
        (AzureAccess("acc", account_key=Secret("canary!", "THERE")), "from THERE is not base64"),
        (AzureAccess(connection_string=Secret("canary", "THERE")), "THERE is not a connection"),
        (AzureAccess(connection_string=Secret("BlobEndpoint=ftp://h", "T")), "BlobEndpoint"),
        (AzureAccess(connection_string=Secret("AccountKey=YQ==", "T")), "AZURE_STORAGE_ACCOUNT"),
    ],
)
def test_an_account_that_cannot_be_is_a_mistake(access: AzureAccess, said: str) -> None:
    """78, without what it has in it."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        open_source("az://cont/m", Access(azure=access))
    assert "canary" not in str(caught.value)


def test_a_connection_string_names_another_cloud() -> None:
    """Its suffix."""
    text = "DefaultEndpointsProtocol=https;AccountName=acc;EndpointSuffix=core.chinacloudapi.cn"
    account = AzureAccount(AzureAccess(connection_string=Secret(text)))
    assert account.url("c", "a b") == "https://acc.blob.core.chinacloudapi.cn/c/a%20b"


# Refusals ----------------------------------------------------------------------------------------


def document(code: str) -> bytes:
    """As Azurite writes it."""
    return (
        '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n<Error>\n'
        f"  <Code>{code}</Code>\n  <Message>Its words.\nRequestId:c064009b\n"
        "Time:2026-11-30T17:37:28.276Z</Message>\n</Error>"
    ).encode()


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (404, "BlobNotFound", NotFoundError, "az://cont/m does not exist"),
        (404, "ContainerNotFound", SourceUnavailableError, "container 'cont' does not exist"),
        (403, "AuthorizationFailure", ForbiddenError, r"AuthorizationFailure\): Its words\.\n"),
        (403, "AuthorizationPermissionMismatch", ForbiddenError, "Storage Blob Data Reader"),
        (403, "AuthenticationFailed", PermissionDeniedError, "does not accept the credentials"),
        (403, "KeyBasedAuthenticationNotPermitted", PermissionDeniedError, "shared keys"),
        (409, "PublicAccessNotPermitted", ForbiddenError, "access denied"),
        (403, "AccountIsDisabled", PermissionDeniedError, "is disabled"),
        (409, "BlobArchived", SourceUnavailableError, "archive tier"),
        (409, "BlobUsesCustomerSpecifiedEncryption", ConfigurationError, "customer-provided key"),
        (400, "OutOfRangeInput", ConfigurationError, "does not accept this name"),
        (503, "ServerBusy", SourceUnavailableError, "answers 503"),
        (500, "OperationTimedOut", SourceUnavailableError, "answers 500"),
    ],
)
@pytest.mark.parametrize("in_header", [True, False])
def test_refusals_say_what_to_do(
    status: int, code: str, kind: type[TensorserveError], said: str, in_header: bool
) -> None:
    """The code is in the document, the header, or both."""
    headers = {"x-ms-error-code": code} if in_header else {}
    body = b"" if in_header and "words" not in said else document(code)
    reply = Reply(status, headers, body)
    with FaultServer(lambda _: reply) as server, pytest.raises(kind, match=said) as caught:
        open_source("az://cont/m", access_of(server.url, account_key=KEY))
    assert "RequestId" not in str(caught.value)
    assert server.fired[str(status)] == (3 if status >= 500 else 1)


def test_a_listing_goes_on_to_the_next_page() -> None:
    """Names relative to the prefix; folders of a hierarchical namespace are left out."""
    blob = "<Blob><Name{}>{}</Name><Properties><Content-Length>{}</Content-Length>{}</Properties>"
    folder = "<ResourceType>directory</ResourceType>"
    pages = {
        "": blob.format("", "m/a", 3, "") + "</Blob>",
        "n+2": blob.format(' Encoded="true"', "m/b%EF%BF%BE", 4, "") + "</Blob>"
        + blob.format("", "m/sub", 0, folder) + "</Blob>",
    }  # fmt: skip

    def answer(asked: Asked) -> Reply:
        marker = asked.path.partition("marker=")[2].replace("%2B", "+")
        more = "" if marker else "<NextMarker>n+2</NextMarker>"
        text = f"<EnumerationResults><Blobs>{pages[marker]}</Blobs>{more}</EnumerationResults>"
        return Reply(200, {}, text.encode())

    with FaultServer(answer) as server:
        access = access_of(server.url, account_key=KEY)
        assert list_names("az://cont/m", access) == {"a": 3, "b\ufffe": 4}
    assert server.requests[0].path.startswith("/acc/cont?restype=container&comp=list&prefix=m%2F")


@pytest.mark.parametrize("status", [200, 404])
def test_a_listing_that_is_none_is_said(status: int) -> None:
    """A portal's page; no such container."""
    body = document("ContainerNotFound") if status == 404 else b"<html>"
    said = "container 'cont' does not exist" if status == 404 else "not Azure's"
    with (
        FaultServer(lambda _: Reply(status, {}, body)) as server,
        pytest.raises(SourceUnavailableError, match=said),
    ):
        list_names("az://cont/m", access_of(server.url, account_key=KEY))


@pytest.mark.parametrize("uri", ["az://", "az:///m", "az://C/m", "az://u:p@c/m", "az://a--b/m"])
def test_what_names_no_container_is_refused(uri: str) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigurationError, match="not the name of a container"):
        split_az(uri)
