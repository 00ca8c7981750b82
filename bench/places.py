"""From which places is the same file loaded, and what is prepared before each load?"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any
from urllib.parse import urlsplit

from bench.directories import CACHE  # first: finds the demo's modules
from bench.model import Model
from bench.page_cache import evict, resident_share, warm
from bench.place import Place
from bench.slow_s3 import file_server, slow_front

from certificates import PrivateCA  # isort: skip
from s3server import S3Server  # isort: skip

BUCKET = "bench"
RATE = 10 * 1024**2  # bytes a second for a connection
DELAY = 0.02  # seconds
NAMES = ("file-warm", "file-cold", "http", "https", "s3", "s3-like")
_VOLUMES_SECONDS = 20.0
# If more than this of a file is still cached after it was dropped, the load was not cold.
_COLD_SHARE = 0.02


@contextmanager
def open_place(name: str, model: Model, *, rate: int, delay: float) -> Iterator[Place]:
    """The case `name`; its servers are stopped at the end. `rate` and `delay` are for s3-like."""
    if name in {"file-warm", "file-cold"}:
        yield _local(name, model)
    elif name in {"http", "https"}:
        with _web_server(model, name) as (url, environment):
            uris = {
                kind: f"{url}/{file.relative_to(model.directory)}"
                for kind, file in model.files.items()
            }
            title = f"{name.upper()} on loopback: nginx, as fast as it goes"
            yield Place(name, title, uris, environment)
    else:
        with served_by_s3(model) as server:
            uris = {kind: f"s3://{BUCKET}/{_object(model, kind)}" for kind in model.files}
            title = "S3 on loopback: SeaweedFS, as fast as it goes"
            if name == "s3":
                yield Place(name, title, uris, server.environment)
                return
            upstream = urlsplit(server.endpoint_url).netloc
            with slow_front(upstream, rate=rate, delay=delay) as front:
                environment = server.environment | {"AWS_ENDPOINT_URL_S3": front.url}
                facts = link_facts(environment, _object(model, "plain"), rate)
                title = (
                    f"like S3: {rate / 1e6:.1f} MB/s a connection, {delay * 1e3:g} ms to the first "
                    "byte (nginx before SeaweedFS)"
                )
                yield Place(name, title, uris, environment, facts=facts)


@contextmanager
def _web_server(model: Model, scheme: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(the server's URL, the environment with which a client trusts its certificate)."""
    if scheme == "http":
        with file_server(model.directory) as server:
            yield server.url, {}
        return
    with TemporaryDirectory() as directory:
        ca = PrivateCA(Path(directory))
        with file_server(model.directory, ca.certificate()) as server:
            # Python's name, and curl's, by which tensorizer reads.
            yield server.url, dict.fromkeys(("SSL_CERT_FILE", "CURL_CA_BUNDLE"), str(ca.bundle))


@contextmanager
def served_by_s3(model: Model) -> Iterator[S3Server]:
    """A real S3 server that has the model's files; they are uploaded once."""
    directory = CACHE / "s3"
    with S3Server(directory) as server:
        server.make_bucket(BUCKET)
        for kind, file in model.files.items():
            _upload(server, file, _object(model, kind))
        yield server


def s3_client(environment: Mapping[str, str]) -> Any:
    """boto3's client for the S3 server that `environment` names."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
    )


def link_facts(environment: Mapping[str, str], key: str, rate: int) -> dict[str, float]:
    """Bytes per second of one and of eight connections, and the time to the first byte.

    Raises RuntimeError if that is not what was asked for: the case would measure something else.
    """
    client = s3_client(environment)
    url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key})
    size = client.head_object(Bucket=BUCKET, Key=key)["ContentLength"]
    count = min(size, rate)  # a second's worth

    def ask(number: int) -> tuple[float, float]:
        request = urllib.request.Request(url, headers={"Range": f"bytes={number}-{count - 1}"})
        started = perf_counter()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request) as response:
            response.read(1)
            first = perf_counter() - started
            while response.read(1024**2):
                pass
        return first, (count - number) / (perf_counter() - started)

    ask(0)  # warms up the server
    wait, alone = ask(0)
    with ThreadPoolExecutor(8) as pool:
        together = sum(got for _, got in pool.map(ask, range(8))) / 8
    facts = {"first_byte_seconds": wait, "one_connection": alone, "each_of_eight": together}
    if not (0.7 * rate < alone < 1.3 * rate and 0.7 * rate < together < 1.3 * rate):
        raise RuntimeError(f"the link is not as asked for ({rate} bytes a second): {facts}")
    return facts


def _local(name: str, model: Model) -> Place:
    def before(kind: str) -> str | None:
        file = model.files[kind]
        if name == "file-warm":
            if resident_share(file) < 1:
                warm(file)
            return None
        evict(file)
        left = resident_share(file)
        return f"{left:.0%} of the file stayed in the page cache" if left > _COLD_SHARE else None

    title = "a local file, in the page cache"
    if name == "file-cold":
        title = "a local file, dropped from the page cache before each load"
    return Place(name, title, {k: str(f) for k, f in model.files.items()}, before=before)


def _object(model: Model, kind: str) -> str:
    return f"{model.directory.name}/{kind}/{model.files[kind].name}"


def _upload(server: S3Server, file: Path, key: str) -> None:
    # The object must be this file, not one of an earlier run with another key.
    info = file.stat()
    mark = json.dumps([key, info.st_size, info.st_mtime_ns])
    done = CACHE / "s3" / "uploaded" / key.replace("/", "_")
    client = s3_client(server.environment)
    if done.exists() and done.read_text() == mark and _readable(client, key):
        return
    print(f"uploading {key} (once) ...", flush=True)
    client.upload_file(str(file), BUCKET, key)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(mark)


def _readable(client: Any, key: str) -> bool:
    """Whether the object's last byte can be had: SeaweedFS answers 500 until it knows its volumes,
    and for good if it was killed while it wrote."""
    from botocore.exceptions import ClientError

    deadline = perf_counter() + _VOLUMES_SECONDS
    while perf_counter() < deadline:
        try:
            client.get_object(Bucket=BUCKET, Key=key, Range="bytes=-1")["Body"].read()
        except ClientError:
            sleep(0.2)
        else:
            return True
    return False
