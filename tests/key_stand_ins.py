"""Stand-ins for Google Cloud KMS, Azure Key Vault and CoCo's Confidential Data Hub, on 127.0.0.1.

They do the real cryptography and speak the interfaces as Google, Microsoft and CoCo document them.
By hand, google-cloud-kms 3.18.0 and azure-keyvault-keys 4.11.3 were run against the first two: each
opened what this package had wrapped, and this package what they had. What the services themselves
do beyond that was not tried. docs/keys.md says so.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from certificates import PrivateCA
from http_server import Handler, HttpServer
from tensorserve.crypto.crc32c import crc32c

_JSON = {"Content-Type": "application/json"}
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)


class _StandIn(AbstractContextManager["_StandIn"]):
    """A server with TLS of a private CA, and one without that gives tokens."""

    def __init__(self, directory: Path, handler: type[Handler]) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.ca = PrivateCA(directory)
        self.token = secrets.token_hex(16)
        self.refuse: tuple[int, dict[str, Any]] | None = None
        """(status, document) of the next answers, instead of the right ones."""
        self.change: Callable[[dict[str, Any]], None] = lambda _: None
        """Called with each right answer, before it is sent."""
        self.asked: list[str] = []
        self.server = HttpServer(handler, tls=self.ca.context())
        self.server.service = self  # type: ignore[attr-defined]
        self.tokens = HttpServer(_Tokens)
        self.tokens.service = self  # type: ignore[attr-defined]

    @property
    def host(self) -> str:
        """127.0.0.1:port"""
        return f"127.0.0.1:{self.server.port}"

    def reset(self) -> None:
        """As in the beginning, but for its keys: for the next test."""
        self.refuse, self.change = None, lambda _: None
        self.asked.clear()

    def __enter__(self) -> Any:
        self.server.__enter__()
        self.tokens.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.tokens.__exit__(None, None, None)
        self.server.__exit__(None, None, None)


class _Tokens(Handler):
    """As Google's token service, and as Azure's managed identities of App Service."""

    def do_POST(self) -> None:
        self._answer({"expires_in": 3600})

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if self.headers.get("X-IDENTITY-HEADER") != "stand-in":
            self.answer(401, {}, b"")
            return
        (resource,) = query["resource"]
        assert resource == "https://vault.azure.net", resource
        self._answer({"expires_on": str(int(time.time()) + 36000), "resource": resource})

    def _answer(self, more: dict[str, Any]) -> None:
        token = {"access_token": self.owner.service.token, "token_type": "Bearer"}
        self.answer(200, _JSON, json.dumps(token | more).encode())


class _Service(Handler):
    """Who has no token gets 401; `refuse` comes before the right answer."""

    challenge: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}

    def do_POST(self) -> None:
        service, body = self.owner.service, self.body()
        service.asked.append(self.path)
        if service.refuse is not None:
            self._send(*service.refuse)
        elif self.headers.get("Authorization") != f"Bearer {service.token}":
            error = {"code": 401, "status": "UNAUTHENTICATED", "message": "no token"}
            self._send(401, {"error": error}, self.challenge)
        else:
            status, answer = self.handled(json.loads(body))
            service.change(answer)
            self._send(status, answer)

    def handled(self, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        raise NotImplementedError

    def _send(
        self, status: int, document: dict[str, Any], headers: Mapping[str, str] = _JSON
    ) -> None:
        self.answer(status, _JSON | headers, json.dumps(document).encode())


# Google -----------------------------------------------------------------------------------------


class _KmsHandler(_Service):
    def handled(self, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name, _, verb = urlsplit(self.path).path.removeprefix("/v1/").rpartition(":")
        key = self.owner.service.keys.get(name)
        if key is None:
            return _google(404, "NOT_FOUND", f"CryptoKey {name} not found.")
        data = {
            field: base64.b64decode(document[field], validate=True)
            for field in ("plaintext", "ciphertext", "additionalAuthenticatedData")
            if field in document
        }
        for field, value in data.items():
            if document.get(f"{field}Crc32c") != str(crc32c(value)):
                return _google(400, "INVALID_ARGUMENT", f"The checksum in {field}_crc32c is wrong.")
        associated = data["additionalAuthenticatedData"]
        if verb == "encrypt":
            nonce = os.urandom(12)
            box = nonce + AESGCM(key).encrypt(nonce, data["plaintext"], associated)
            return 200, {
                "name": f"{name}/cryptoKeyVersions/1",
                **_with_crc("ciphertext", box),
                "verifiedPlaintextCrc32c": True,
                "verifiedAdditionalAuthenticatedDataCrc32c": True,
                "protectionLevel": "SOFTWARE",
            }
        box = data["ciphertext"]
        try:
            opened = AESGCM(key).decrypt(box[:12], box[12:], associated)
        except (InvalidTag, ValueError):
            text = "Decryption failed: verify that 'name' refers to the correct CryptoKey."
            return _google(400, "INVALID_ARGUMENT", text)
        return 200, _with_crc("plaintext", opened) | {"usedPrimary": True}


def _google(code: int, status: str, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"error": {"code": code, "status": status, "message": message}}


def _with_crc(field: str, data: bytes) -> dict[str, Any]:
    return {field: base64.b64encode(data).decode(), f"{field}Crc32c": str(crc32c(data))}


class GoogleKms(_StandIn):
    """Google Cloud KMS: encrypt and decrypt, with CRC32C both ways."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, _KmsHandler)
        self.keys: dict[str, bytes] = {}
        self._account = directory / "service-account.json"

    def make_key(self, name: str) -> str:
        """A symmetric key; gives its full name."""
        full = f"projects/p/locations/global/keyRings/r/cryptoKeys/{name}"
        self.keys[full] = AESGCM.generate_key(256)
        return full

    @property
    def environ(self) -> dict[str, str]:
        """The variables of a start that uses it."""
        if not self._account.exists():
            key = rsa.generate_private_key(65537, 2048)
            pem = key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            document = {
                "type": "service_account",
                "client_email": "server@p.example",
                "private_key": pem.decode(),
                "private_key_id": "1",
                "token_uri": f"{self.tokens.url}/token",
            }
            self._account.write_text(json.dumps(document))
        return {
            "GOOGLE_APPLICATION_CREDENTIALS": str(self._account),
            "SSL_CERT_FILE": str(self.ca.bundle),
        }


# Azure ------------------------------------------------------------------------------------------


class _VaultHandler(_Service):
    # Microsoft's client asks without a token first, and learns from this where it gets one.
    challenge: Mapping[str, str] = {
        "WWW-Authenticate": 'Bearer authorization="https://login.microsoftonline.com/tenant", '
        'resource="https://vault.azure.net"'
    }

    def handled(self, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        path = urlsplit(self.path)
        assert parse_qs(path.query) == {"api-version": ["7.4"]}
        _, keys, name, version, verb = path.path.split("/")
        versions = self.owner.service.keys.get(name, {})
        version = version or next(reversed(versions), "")
        if keys != "keys" or version not in versions:
            return _azure(404, "KeyNotFound", f"A key with name {name} was not found.")
        key = versions[version]
        if document["alg"] != "RSA-OAEP-256":
            return _azure(400, "BadParameter", "Key and algorithm are incompatible.")
        value = base64.urlsafe_b64decode(document["value"] + "==")
        try:
            if verb == "wrapkey":
                made = key.public_key().encrypt(value, _OAEP)
            else:
                made = key.decrypt(value, _OAEP)
        except ValueError:
            return _azure(400, "BadParameter", "The value could not be unwrapped.")
        text = base64.urlsafe_b64encode(made).decode().rstrip("=")
        return 200, {
            "kid": f"https://{self.owner.service.host}/keys/{name}/{version}",
            "value": text,
        }


def _azure(status: int, code: str, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"code": code, "message": message}}


class KeyVault(_StandIn):
    """Azure Key Vault: wrapkey and unwrapkey with RSA-OAEP-256."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, _VaultHandler)
        self.keys: dict[str, dict[str, rsa.RSAPrivateKey]] = {}

    def make_key(self, name: str) -> str:
        """A new version of the key `name`; gives the version."""
        version = secrets.token_hex(16)
        self.keys.setdefault(name, {})[version] = rsa.generate_private_key(65537, 2048)
        return version

    @property
    def environ(self) -> dict[str, str]:
        """The variables of a start that uses it."""
        return {
            "IDENTITY_ENDPOINT": f"{self.tokens.url}/msi/token",
            "IDENTITY_HEADER": "stand-in",
            "AZURE_TOKEN_CREDENTIALS": "prod",  # not the command lines of developers
            "AZURE_CONFIG_DIR": str(self.directory),
            "SSL_CERT_FILE": str(self.ca.bundle),
        }


# CoCo -------------------------------------------------------------------------------------------


class _HubHandler(Handler):
    def do_GET(self) -> None:
        """As api-server-rest: what its hub cannot get is 500, whatever the broker says."""
        self.owner.asked.append(self.path)
        if self.owner.refuse is not None:
            self.answer(self.owner.refuse[0], {}, self.owner.refuse[1])
            return
        found = self.owner.resources.get(self.path.removeprefix("/cdh/resource/"))
        if not self.path.startswith("/cdh/resource/"):
            self.answer(404, {}, b"URL NOT FOUND")
        elif found is None:
            self.answer(500, {}, b"rpc status: get resource: KBS: resource not found")
        else:
            self.answer(200, {"Content-Type": "application/octet-stream"}, found)


class DataHub(HttpServer):
    """A guest's Confidential Data Hub, as api-server-rest shows it."""

    def __init__(self) -> None:
        super().__init__(_HubHandler)
        self.resources: dict[str, bytes] = {}
        self.refuse: tuple[int, bytes] | None = None
        self.asked: list[str] = []

    @property
    def environ(self) -> dict[str, str]:
        """The variables of a start in this guest."""
        return {"TENSORSERVE_CDH_URL": self.url}
