"""Key services on 127.0.0.1: a real OpenBao, and moto's server in the place of AWS KMS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openbao as openbao_server
from s3server import free_ports

from certificates import PrivateCA
from http_server import Handler
from waiting import wait_for

_SECONDS = 60.0


class OpenBao(openbao_server.OpenBao):
    """An unsealed OpenBao with a transit engine and its key `models`."""

    def seal(self) -> None:
        """Everything is answered with 503 from now on."""
        self.ask("PUT", "sys/seal")

    def app_role(self, policy: str) -> tuple[str, str]:
        """(RoleID, SecretID) of a new AppRole with one policy."""
        if "approle/" not in self.ask("GET", "sys/auth")["data"]:
            self.ask("POST", "sys/auth/approle", {"type": "approle"})
        role = f"auth/approle/role/{policy}"
        self.ask("POST", role, {"token_policies": [policy]})
        name = self.ask("GET", f"{role}/role-id")["data"]["role_id"]
        return str(name), str(self.ask("POST", f"{role}/secret-id", {})["data"]["secret_id"])

    def kubernetes_role(self, role: str, policy: str, api_server: str, ca: PrivateCA) -> None:
        """A role for service accounts whose tokens `api_server` reviews."""
        self.ask("POST", "sys/auth/kubernetes", {"type": "kubernetes"})
        config = {
            "kubernetes_host": api_server,
            "kubernetes_ca_cert": ca.bundle.read_text(),
            "token_reviewer_jwt": "reviewer",
            "disable_local_ca_jwt": True,
        }
        self.ask("POST", "auth/kubernetes/config", config)
        bound = {
            "bound_service_account_names": ["server"],
            "bound_service_account_namespaces": ["models"],
            "token_policies": [policy],
        }
        self.ask("POST", f"auth/kubernetes/role/{role}", bound)


@contextmanager
def openbao(ca: PrivateCA | None = None) -> Iterator[OpenBao]:
    """A running one, with TLS where `ca` is given."""
    tls = (None, None) if ca is None else (str(ca.bundle), ca.certificate())
    with openbao_server.running(*tls, kind=OpenBao) as server:
        yield server


class TokenReviews(Handler):
    """What of Kubernetes' API OpenBao asks: whose service account's token it is."""

    def do_POST(self) -> None:
        """`good` is the token of models/server."""
        token = json.loads(self.body())["spec"]["token"]
        user = {"username": "system:serviceaccount:models:server", "uid": "1", "groups": []}
        status = {"authenticated": token == GOOD_JWT, "user": user}
        if token != GOOD_JWT:
            status = {"authenticated": False, "error": "not this one"}
        text = json.dumps({"kind": "TokenReview", "status": status}).encode()
        self.answer(201, {"Content-Type": "application/json"}, text)


def _jwt() -> str:
    from base64 import urlsafe_b64encode

    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    def part(data: bytes) -> str:
        return urlsafe_b64encode(data).rstrip(b"=").decode()

    claims = {
        "iss": "kubernetes/serviceaccount",
        "sub": "system:serviceaccount:models:server",
        "kubernetes.io": {
            "namespace": "models",
            "serviceaccount": {"name": "server", "uid": "1"},
        },
    }
    text = ".".join(
        part(json.dumps(one).encode()) for one in ({"alg": "ES256", "typ": "JWT"}, claims)
    )
    key = ec.generate_private_key(ec.SECP256R1())
    r, s = utils.decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{text}.{part(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


GOOD_JWT = _jwt()


class Kms:
    """moto's KMS: a stand-in, not AWS's. It compares encryption contexts and knows no rights."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.region = "eu-central-1"

    @property
    def environ(self) -> dict[str, str]:
        """The variables of a start that uses it."""
        return {
            "AWS_ENDPOINT_URL_KMS": self.url,
            "AWS_REGION": self.region,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "testtest",
        }

    def client(self) -> Any:
        """boto3's."""
        import boto3

        return boto3.client(
            "kms",
            endpoint_url=self.url,
            region_name=self.region,
            aws_access_key_id="test",
            aws_secret_access_key="testtest",
        )

    def make_key(self, alias: str) -> str:
        """A symmetric key with the alias `alias/…`; gives its ARN."""
        client = self.client()
        made = client.create_key()["KeyMetadata"]
        client.create_alias(AliasName=f"alias/{alias}", TargetKeyId=made["KeyId"])
        return str(made["Arn"])


@contextmanager
def moto_server() -> Iterator[Kms]:
    """A running one."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    words = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1"]
    with tempfile.TemporaryDirectory() as directory, _running([*words, "-p", str(port)], directory):
        wait_for(lambda: _is_moto(url), _SECONDS, every=0.05)
        yield Kms(url)


def _is_moto(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/moto-api/", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def _running(words: list[str], directory: str) -> Iterator[None]:
    """A server's process, ended at the end."""
    assert shutil.which(words[0]), f"{words[0]} is not installed: make venv"
    log = Path(directory) / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            cwd=directory,
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()
