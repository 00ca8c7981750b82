"""A real OpenBao with a transit engine, for the demo, the tests and bench/.

Its only unseal key and its root token are in this process's memory, or in a file beside its data:
right for a demo, wrong for anything else.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s3server import free_ports

READY_SECONDS = 60.0
PROGRAM = str(Path(sys.executable).with_name("bao"))
_CONFIG = """
{storage}
api_addr = "{url}"
listener "tcp" {{
  address = "{address}"
  {more}
}}
"""
_ON_DISK = """
storage "raft" {{
  path = "{directory}"
  node_id = "only"
}}
cluster_addr = "https://127.0.0.1:{cluster_port}"
"""
CLUSTER_PORT = 8201


def configuration(
    url: str,
    address: str,
    *,
    directory: Path | None = None,
    cluster_port: int = CLUSTER_PORT,
    certificate: Path | None = None,
) -> str:
    """Its configuration: data in `directory` or in memory, TLS with a `certificate` (and its key in
    the same file) or none. What keeps data listens on `cluster_port` of this machine too."""
    storage, more = 'storage "inmem" {}', ["tls_disable = true"]
    if certificate is not None:
        more = [f'tls_cert_file = "{certificate}"', f'tls_key_file = "{certificate}"']
    if directory is not None:
        storage = _ON_DISK.format(directory=directory, cluster_port=cluster_port)
        more.append(f'cluster_address = "127.0.0.1:{cluster_port}"')
    return _CONFIG.format(storage=storage, url=url, address=address, more="\n  ".join(more))


class OpenBao:
    """One that runs at `url`, asked as its owner."""

    def __init__(self, url: str, ca_file: str | None = None) -> None:
        self.url = url
        self.ca_file = ca_file
        self.token = ""
        self.unseal_key = ""

    def wait(self, path: str = "sys/init") -> None:
        """Until it answers what `path` asks. Raises TimeoutError."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                self.ask("GET", path)
                return
            except OSError as error:  # an HTTPError is one
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.url} does not answer") from error
            time.sleep(0.05)

    def set_up(self) -> None:
        """Initialise, unseal, and mount transit/ with its key `models`."""
        made = self.ask("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self.token, self.unseal_key = made["root_token"], made["keys_base64"][0]
        self.unseal()
        self.ask("POST", "sys/mounts/transit", {"type": "transit"})
        self.make_key("models")

    def unseal(self) -> None:
        """Make it answer again: 200 of sys/health is unsealed, and not on standby."""
        self.ask("PUT", "sys/unseal", {"key": self.unseal_key})
        self.wait("sys/health")

    def make_key(self, name: str, kind: str = "aes256-gcm96") -> None:
        """A key of the transit engine."""
        self.ask("POST", f"transit/keys/{name}", {"type": kind})

    def rotate(self, name: str) -> None:
        """A new version of a key, with which is encrypted from now on."""
        self.ask("POST", f"transit/keys/{name}/rotate", {})

    def policy(self, name: str, *paths: str) -> None:
        """A policy that grants `update` on `paths`."""
        rules = {path: {"capabilities": ["update"]} for path in paths}
        self.ask("PUT", f"sys/policies/acl/{name}", {"policy": json.dumps({"path": rules})})

    def token_for(self, policy: str) -> str:
        """A token with one policy."""
        made = self.ask("POST", "auth/token/create", {"policies": [policy]})
        return str(made["auth"]["client_token"])

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """An answer of its API."""
        asked = urllib.request.Request(
            f"{self.url}/v1/{path}",
            None if body is None else json.dumps(body).encode(),
            {"X-Vault-Token": self.token} if self.token else {},
            method=method,
        )
        context = None
        if self.ca_file is not None:
            context = ssl.create_default_context(cafile=self.ca_file)
        try:
            with urllib.request.urlopen(asked, timeout=30, context=context) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            error.add_note(error.read().decode(errors="replace"))
            raise
        return json.loads(text) if text else {}


@contextmanager
def running(
    ca_file: str | None = None, certificate: Path | None = None, kind: type[OpenBao] = OpenBao
) -> Iterator[Any]:
    """One on 127.0.0.1 that is set up, of class `kind`, with TLS where a `certificate` is given."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    url = f"http{'s' if certificate else ''}://{address}"
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "bao.hcl"
        config.write_text(configuration(url, address, certificate=certificate))
        with (Path(directory) / "log").open("wb") as out:
            process = subprocess.Popen(
                [PROGRAM, "server", "-config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
                cwd=directory,
            )
        try:
            server = kind(url, ca_file)
            server.wait()
            server.set_up()
            yield server
        finally:
            process.kill()
            process.wait()
