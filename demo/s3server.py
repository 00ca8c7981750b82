"""A real S3 server (SeaweedFS) on 127.0.0.1 and free ports, for the demo, the tests and bench/."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

READY_SECONDS = 60.0
# Below the kernel's ephemeral ports.
_PORTS = 12_000
OPTIONS = (
    "-s3",
    # Small volumes: the first write allocates one.
    "-master.volumeSizeLimitMB=1024",
    "-volume.max=50",
    # Catalogs that it would open on fixed ports.
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
)


class S3Server:
    """`with S3Server(directory) as server:`; it is stopped at the end, whatever happens."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.access_key = "demo-" + secrets.token_hex(8)
        self.secret_key = secrets.token_hex(20)
        self.port = 0
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        """For AWS_ENDPOINT_URL_S3."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to reach it."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start, and wait until it answers."""
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        identities = self.directory / "identities.json"
        write_identities(identities, self.access_key, self.secret_key)
        # Started again, it is where it was.
        self._ports = self._ports or free_ports(9)
        ports = self._ports
        self.port = ports[0]
        names = ["s3.port", "master.port", "volume.port", "filer.port"]
        names += [f"{name}.grpc" for name in names]
        options = [f"-{name}={port}" for name, port in zip(names, ports, strict=False)]
        weed = [
            str(Path(sys.executable).with_name("weed")),
            "server",
            f"-dir={self.directory / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={identities}",
            *OPTIONS,
            *options,
        ]
        try:
            with (self.directory / "weed.log").open("wb") as log, signals_held():
                self._process = subprocess.Popen(
                    weed,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._wait()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it and wait until it is gone. May be called twice."""
        if self._process is None:
            return
        process, self._process = self._process, None
        for number, seconds in ((signal.SIGTERM, 1.5), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(process.pid, number)
                process.wait(seconds)
            except ProcessLookupError:
                process.wait()
                return
            except subprocess.TimeoutExpired:
                continue
            return

    def make_bucket(self, name: str) -> None:
        """Make a bucket, waiting until the server can store something in it."""
        make_bucket(name, self.endpoint_url, self.access_key, self.secret_key)

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.endpoint_url, timeout=1):
                    return
            except urllib.error.HTTPError:
                return  # it answers: an unsigned request is refused, as it should be
            except OSError:
                time.sleep(0.1)
        log = (self.directory / "weed.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the S3 server did not start:\n{log}")


@contextmanager
def signals_held() -> Iterator[None]:
    """What asks this program to stop takes effect after the block, not within.

    Ctrl-C within Popen is raised when the process runs already and nobody knows its number.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread alone
        return
    received: list[int] = []

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handler = signal.getsignal(number)
        # What is ignored stays so, here and in the new process.
        if callable(handler):
            before[number] = handler
            signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            os.kill(os.getpid(), number)


def write_identities(path: Path, access_key: str, secret_key: str) -> None:
    """SeaweedFS's list of who may do what: one user, everything. 0600."""
    identity = {
        "name": "demo",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps({"identities": [identity]}))


def make_bucket(name: str, endpoint_url: str, access_key: str, secret_key: str) -> None:
    """Make a bucket, waiting until the server is up and can store something in it."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
    )
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            client.create_bucket(Bucket=name)
            client.put_object(Bucket=name, Key=".ready", Body=b"")
            client.delete_object(Bucket=name, Key=".ready")
            return
        except (ClientError, BotoCoreError) as error:
            if "BucketAlready" in str(error):
                return
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now, and that the kernel gives to no connection by itself.

    A server may bind one half a minute later: an ephemeral port may be some connection's by then.
    """
    chance = random.SystemRandom()
    first = _first_ephemeral_port()
    found: list[int] = []
    probes: list[socket.socket] = []
    try:
        while len(found) < count:
            probe = socket.socket()
            probes.append(probe)
            with suppress(OSError):  # taken
                probe.bind(("127.0.0.1", chance.randrange(first - _PORTS, first) if first else 0))
                found.append(probe.getsockname()[1])
    finally:
        for probe in probes:
            probe.close()
    return found


def _first_ephemeral_port() -> int:
    """Of the kernel's range; 0 where there is no room below it."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0
    return first if first > 2 * _PORTS else 0
