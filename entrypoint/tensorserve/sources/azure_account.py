"""Which storage account is asked, and with which credentials? Azure's variables say so.

One of these, in this order: a shared key, a shared access signature (SAS), a token of Entra ID by
azure-identity (service principal, workload identity, managed identity, the command line's login).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping
from email.utils import formatdate
from ipaddress import ip_address
from urllib.parse import parse_qsl, quote, urlsplit

from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret
from tensorserve.sources.base import AzureAccess
from tensorserve.sources.cloud_account import CloudAccount, Shared
from tensorserve.sources.entra_token import EntraToken
from tensorserve.sources.library_logs import hold_back
from tensorserve.sources.ssrf_guard import host_and_port

# Known to every service and emulator of the last years; later versions change nothing that is used.
_VERSION = "2021-12-02"
_SCOPE = "https://storage.azure.com/.default"
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_HINT = (
    "Set AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING (or their "
    "_FILE forms); or AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET of a service "
    "principal; or give the machine or pod an identity."
)
# In the order of the string that is signed.
_SIGNED = (
    *("Content-Encoding", "Content-Language", "Content-Length", "Content-MD5", "Content-Type"),
    *("Date", "If-Modified-Since", "If-Match", "If-None-Match", "If-Unmodified-Since", "Range"),
)


class AzureAccount(CloudAccount):
    """Endpoint and credentials for one AzureAccess. Thread-safe."""

    def __init__(self, access: AzureAccess) -> None:
        """Raises ConfigurationError if there is no account, or what is given contradicts itself."""
        super().__init__()
        hold_back()
        given = _connection(access.connection_string)
        self.name = given.get("accountname") or access.account or ""
        self.endpoint = _endpoint(given, self.name)
        key = given.get("accountkey")
        sas = given.get("sharedaccesssignature")
        self._key = _key(
            Secret(key, "AZURE_STORAGE_CONNECTION_STRING") if key else access.account_key
        )
        self._sas = ""
        if self._key is None and (sas or access.sas_token is not None):
            self._sas = (sas or access.sas_token.reveal_text()).lstrip("?&")  # type: ignore[union-attr]
        self._entra = EntraToken(access, _SCOPE, "az:// without a key or a SAS", _HINT)

    def url(self, container: str, name: str, query: str = "") -> str:
        """Of a blob, or of a container for an empty `name`; with the SAS, if there is one."""
        path = f"/{container}/{quote(name, safe='/-_.~')}" if name else f"/{container}"
        joined = "&".join(part for part in (query, self._sas) if part)
        return f"{self.endpoint}{path}" + (f"?{joined}" if joined else "")

    def authorized(
        self, method: str, url: str, headers: Mapping[str, str], length: int
    ) -> dict[str, str]:
        """As `CloudAccount.authorized`: with a signature, a SAS in `url`, or a bearer token."""
        found = dict(headers) | {
            "x-ms-version": _VERSION,
            "x-ms-date": formatdate(usegmt=True),
        }
        if self._key is not None:
            text = _string_to_sign(self.name, method, url, found, length)
            digest = hmac.digest(self._key.reveal(), text.encode(), hashlib.sha256)
            found["Authorization"] = f"SharedKey {self.name}:{base64.b64encode(digest).decode()}"
        elif not self._sas:
            with self.lock:
                found["Authorization"] = f"Bearer {self._bearer()}"
        return found

    def _bearer(self) -> str:
        """A valid token."""
        _refuse_plain(self.endpoint)
        return self._entra.get()

    def _renewed(self) -> bool:
        return self._key is None and not self._sas and self._entra.renewed()


def _string_to_sign(
    account: str, method: str, url: str, headers: Mapping[str, str], length: int
) -> str:
    """As Microsoft describes it for the Blob service, from version 2015-02-21 on
    (https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key).
    """
    given = {name.lower(): value for name, value in headers.items()}
    given["content-length"] = str(length) if length else ""
    lines = [method, *(given.get(name.lower(), "") for name in _SIGNED)]
    lines += [f"{name}:{given[name]}" for name in sorted(given) if name.startswith("x-ms-")]
    parts = urlsplit(url)
    lines.append(f"/{account}{parts.path}")
    query = parse_qsl(parts.query, keep_blank_values=True)
    lines += [f"{name.lower()}:{value}" for name, value in sorted(query)]
    return "\n".join(lines)


def _connection(text: Secret | None) -> dict[str, str]:
    """The parts of a connection string, under names in small letters."""
    if text is None:
        return {}
    found = {}
    for part in filter(None, text.reveal_text().strip(";").split(";")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isalpha():
            raise ConfigurationError(
                f"{text.origin} is not a connection string.",
                hint="It has parts like AccountName=…;AccountKey=…, with semicolons between them: "
                "copy it from the storage account's page, or from `az storage account "
                "show-connection-string`.",
            )
        found[name.strip().lower()] = value.strip()
    return found


def _endpoint(given: Mapping[str, str], account: str) -> str:
    """https://host[/path] of the account's blobs."""
    endpoint = given.get("blobendpoint", "").rstrip("/")
    if endpoint:
        host_and_port(endpoint, "BlobEndpoint of AZURE_STORAGE_CONNECTION_STRING")
        if endpoint.partition("://")[0].lower() not in {"http", "https"} or "@" in endpoint:
            raise ConfigurationError(
                "BlobEndpoint of AZURE_STORAGE_CONNECTION_STRING is not a URL.",
                hint="Use https://host[:port]/path.",
            )
        return endpoint.partition("?")[0]
    if not account:
        raise ConfigurationError(
            "az:// needs the name of a storage account.",
            hint="Set AZURE_STORAGE_ACCOUNT, or AZURE_STORAGE_CONNECTION_STRING.",
        )
    if not _ACCOUNT.fullmatch(account):
        raise ConfigurationError(
            f"{account[:80]!r} is not the name of a storage account.",
            hint="It has 3 to 24 small letters and digits, without .blob.core.windows.net.",
        )
    scheme = given.get("defaultendpointsprotocol", "https").lower()
    endpoint = f"{scheme}://{account}.blob.{given.get('endpointsuffix', 'core.windows.net')}"
    host_and_port(endpoint, "AZURE_STORAGE_CONNECTION_STRING")
    return endpoint


def _key(given: Secret | None) -> Secret | None:
    """The decoded key."""
    if given is None:
        return None
    try:
        return Secret(base64.b64decode(given.reveal(), validate=True), given.origin)
    except (binascii.Error, ValueError):
        raise ConfigurationError(
            f"The account key from {given.origin} is not base64.",
            hint="Copy it from the storage account's page, or from `az storage account keys list`.",
        ) from None


def _refuse_plain(endpoint: str) -> None:
    """A token gives access to all that the identity may read: it is not sent in the clear."""
    host, _ = host_and_port(endpoint, "The storage account's endpoint")
    try:
        here = ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    if endpoint.startswith("http://") and not here:
        raise ConfigurationError(
            "The storage account's endpoint is plain http, over which no token is sent.",
            hint="Use https in AZURE_STORAGE_CONNECTION_STRING.",
        )


account_for = Shared(AzureAccount)
