"""Ranges over HTTP: every fault of FAULTS.md F1-F6, F16, F17 and A8, through real sockets."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from fronts import Front
from rangeserver import Fault, RangeServer
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.sources import Access, NotFoundError, RetryPolicy, open_source
from tensorserve.sources.retry import full_jitter, retry_after

SIZE = 700_000
ATTEMPTS = 5
POLICY = RetryPolicy(
    attempts=ATTEMPTS, deadline=5.0, connect_timeout=1.0, stall_timeout=0.4, backoff_base=0.01
)
ACCESS = Access(policy=POLICY)


class Watching:
    """A FetchObserver that remembers."""

    def __init__(self) -> None:
        self.requests = 0
        self.reasons: list[str] = []
        self.bytes = 0

    def request(self) -> None:
        self.requests += 1

    def retry(self, reason: str) -> None:
        self.reasons.append(reason)

    def received(self, count: int) -> None:
        self.bytes += count


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    content = os.urandom(SIZE)
    (tmp_path / "model.tensors").write_bytes(content)
    return content


@pytest.fixture
def server(tmp_path: Path, data: bytes) -> Iterator[RangeServer]:  # noqa: ARG001
    with RangeServer(tmp_path) as running:
        yield running


def read_all(server: RangeServer, watching: Watching | None = None) -> bytes:
    source = open_source(f"{server.url}/model.tensors", ACCESS, watching)
    try:
        assert source.size == SIZE
        return source.read(0, source.size)
    finally:
        source.close()


def test_a_range_is_read_as_it_is(server: RangeServer, data: bytes) -> None:
    """Without trouble: two requests, the exact bytes, and the version pinned."""
    watching = Watching()
    assert read_all(server, watching) == data
    assert watching.requests == 2
    _, headers = server.requests[-1]
    assert headers["If-Match"].startswith('"')
    assert headers["Accept-Encoding"] == "identity"


def test_small_files_need_one_request(server: RangeServer, tmp_path: Path) -> None:
    """The bytes that came with the open are not asked for again."""
    (tmp_path / "config.json").write_text("{}")
    watching = Watching()
    source = open_source(f"{server.url}/config.json", ACCESS, watching)
    assert source.read(0, source.size) == b"{}"
    assert watching.requests == 1


def test_many_threads_share_one_source(server: RangeServer, data: bytes) -> None:
    """The loader reads with many connections."""
    source = open_source(f"{server.url}/model.tensors", ACCESS)
    found: dict[int, bytes] = {}

    def read(start: int) -> None:
        found[start] = source.read(start, 70_000)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(0, SIZE, 70_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"".join(found[n] for n in sorted(found)) == data


@pytest.mark.parametrize(
    ("kind", "reason"), [("reset", "reset"), ("short", "short_body"), ("stall", "stall")]
)
def test_a_broken_range_goes_on_where_it_stopped(
    server: RangeServer, data: bytes, kind: str, reason: str
) -> None:
    """F1, F3: what has arrived is not asked for again, and the version stays bound."""
    watching = Watching()
    source = open_source(f"{server.url}/model.tensors", ACCESS, watching)
    server.faults = [Fault(kind, times=2, after=100_000, beyond=0)]
    assert source.read(0, SIZE) == data
    assert server.fired[kind] == 2
    assert watching.reasons == [reason, reason]
    starts = [int(h["Range"].split("=")[1].split("-")[0]) for _, h in server.requests[-2:]]
    # A reset throws away what the kernel had received and nobody had read yet.
    assert starts[-1] >= (1 if kind == "reset" else 100_000)
    assert "If-Match" in server.requests[-1][1]


def test_a_trickle_is_as_good_as_a_stall(server: RangeServer, data: bytes) -> None:
    """F3: a byte now and then keeps a socket alive, and a start for ever."""
    slow = RetryPolicy(
        attempts=5, deadline=5, stall_timeout=0.4, minimum_rate=10e6, backoff_base=0.01
    )
    watching = Watching()
    source = open_source(f"{server.url}/model.tensors", Access(policy=slow), watching)
    server.faults = [Fault("trickle", after=1000, beyond=0)]
    assert source.read(0, SIZE) == data
    assert server.fired["trickle"] == 1
    assert watching.reasons == ["stall"]


@pytest.mark.parametrize("code", [429, 500, 502, 503])
def test_passing_refusals_are_tried_again_and_counted(
    server: RangeServer, data: bytes, code: int
) -> None:
    """F2."""
    watching = Watching()
    source = open_source(f"{server.url}/model.tensors", ACCESS, watching)
    server.faults = [Fault("status", times=2, code=code, beyond=0)]
    assert source.read(0, SIZE) == data
    assert server.fired["status"] == 2
    assert watching.reasons == [f"status_{code}"] * 2


def test_retry_after_is_honoured() -> None:
    """F2: seconds or a date, and never an hour."""
    assert retry_after("3") == 3.0
    assert retry_after("100000") == 60.0
    assert retry_after(formatdate(1_000_005, usegmt=True), now=1_000_000.0) == 5.0
    assert retry_after("soon") is None
    assert retry_after(None) is None


def test_back_off_is_full_jitter_below_a_cap() -> None:
    """F2: uniform from nothing to a bound that doubles."""
    policy = RetryPolicy(backoff_base=0.1, backoff_cap=2.0)
    for failures in range(12):
        waits = [full_jitter(failures, policy) for _ in range(200)]
        assert min(waits) >= 0
        assert max(waits) <= min(2.0, 0.1 * 2**failures)
    assert min(full_jitter(10, policy) for _ in range(500)) < 0.2


def test_trouble_without_end_ends_the_start(server: RangeServer) -> None:
    """F2: attempts are bounded; exit code 69."""
    source = open_source(f"{server.url}/model.tensors", ACCESS)
    server.faults = [Fault("status", times=1000, code=503, beyond=0)]
    with pytest.raises(SourceUnavailableError, match="503") as caught:
        source.read(0, SIZE)
    assert server.fired["status"] == ATTEMPTS
    assert caught.value.exit_code == 69


def test_a_200_to_a_range_is_never_data(server: RangeServer) -> None:
    """F4: at an offset it would be the wrong bytes."""
    source = open_source(f"{server.url}/model.tensors", ACCESS)
    server.faults = [Fault("full", times=1000)]
    with pytest.raises(SourceUnavailableError, match="200"):
        source.read(100_000, 50_000)
    assert server.fired["full"] == 1


def test_a_server_without_ranges_is_refused_at_open(server: RangeServer) -> None:
    """F4: said before anything is read."""
    server.faults = [Fault("full", times=1000, beyond=0)]
    with pytest.raises(SourceUnavailableError, match="does not serve ranges"):
        open_source(f"{server.url}/model.tensors", ACCESS)
    assert server.fired["full"] == 1


@pytest.mark.parametrize("kind", ["wrong_range", "no_range_header"])
def test_a_wrong_content_range_is_never_data(server: RangeServer, data: bytes, kind: str) -> None:
    """F4: one such answer is tried again; without end it is fatal."""
    source = open_source(f"{server.url}/model.tensors", ACCESS)
    server.faults = [Fault(kind, times=1)]
    assert source.read(70_000, 50_000) == data[70_000:120_000]
    assert server.fired[kind] == 1
    server.faults = [Fault(kind, times=1000)]
    with pytest.raises(SourceUnavailableError):
        source.read(70_000, 50_000)


def test_the_name_of_an_upload_s_transfer_is_no_encoding(server: RangeServer, data: bytes) -> None:
    """Stores that speak like S3 give `aws-chunked` back, for presigned and public URLs too."""
    with Front(int(server.url.rpartition(":")[2]), name="aws-chunked") as front:
        source = open_source(f"{front.url}/model.tensors", ACCESS)
        assert source.read(100_000, 300_000) == data[100_000:400_000]


def test_an_encoded_body_is_refused(server: RangeServer) -> None:
    """Compressed ranges are ranges of something else."""
    source = open_source(f"{server.url}/model.tensors", ACCESS)
    server.faults = [Fault("encoded", times=1)]
    with pytest.raises(SourceUnavailableError, match="gzip"):
        source.read(70_000, 50_000)


def test_a_403_in_the_middle_of_a_presigned_url_is_said_as_such(server: RangeServer) -> None:
    """F5: nothing can be signed again here: exit code 77."""
    source = open_source(f"{server.url}/model.tensors?X-Amz-Signature=canary", ACCESS)
    server.faults = [Fault("status", code=403)]
    with pytest.raises(PermissionDeniedError, match="presigned") as caught:
        source.read(70_000, 50_000)
    assert server.fired["status"] == 1
    assert "canary" not in str(caught.value)


def test_an_object_replaced_in_the_middle_is_fatal(server: RangeServer) -> None:
    """F6: never a mixture of two files."""
    source = open_source(f"{server.url}/model.tensors", ACCESS)
    server.faults = [Fault("changed")]
    with pytest.raises(CorruptError, match="replaced") as caught:
        source.read(70_000, 50_000)
    assert server.fired["changed"] == 1
    assert caught.value.exit_code == 65


def test_a_missing_object_is_not_found(server: RangeServer) -> None:
    """Told apart from trouble: nothing is tried again."""
    with pytest.raises(NotFoundError):
        open_source(f"{server.url}/other.tensors", ACCESS)
    assert len(server.requests) == 1


def test_a_refused_connection_is_said_as_such() -> None:
    """F16: retried, then 69."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    watching = Watching()
    with pytest.raises(SourceUnavailableError, match="refused") as caught:
        open_source(f"http://127.0.0.1:{port}/m", ACCESS, watching)
    assert caught.value.exit_code == 69
    assert watching.reasons == ["connect"] * (ATTEMPTS - 1)


def test_the_deadline_alone_ends_the_attempts() -> None:
    """`TENSORSERVE_FETCH_DEADLINE` is what it says, however fast a connection is refused."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        watching = Watching()
        policy = RetryPolicy(deadline=1.0, backoff_base=0.001, backoff_cap=0.01)
        with pytest.raises(SourceUnavailableError, match="attempts in 1 s"):
            open_source(f"http://127.0.0.1:{port}/m", Access(policy=policy), watching)
    assert len(watching.reasons) > 12


def test_a_server_that_wants_no_pause_is_asked_with_one(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Retry-After: 0` with each answer: the pauses grow all the same."""
    pauses: list[float] = []
    monkeypatch.setattr("tensorserve.sources.retry.time.sleep", pauses.append)
    monkeypatch.setattr("tensorserve.sources.retry.random.uniform", lambda _, high: high)
    server.faults.append(Fault("status", times=8, headers={"Retry-After": "0"}, beyond=0))
    policy = RetryPolicy(backoff_base=0.01)
    open_source(f"{server.url}/model.tensors", Access(policy=policy)).close()
    assert pauses[:3] == [0, 0, 0]
    assert pauses[3:] == [0.01 * 2.0**n for n in range(4, 9)]


def test_a_name_that_does_not_resolve_is_said_as_such() -> None:
    """F16: retried, since name servers come late in a cluster."""
    watching = Watching()
    policy = RetryPolicy(attempts=2, backoff_base=0.01)
    with pytest.raises(SourceUnavailableError, match="cannot be resolved"):
        open_source("http://no-such-host.invalid/m", Access(policy=policy), watching)
    assert watching.reasons == ["dns"]


def test_tls_with_a_server_that_speaks_none_is_said_as_such(server: RangeServer) -> None:
    """F16: does not pass, so it is not retried."""
    with pytest.raises(SourceUnavailableError, match="TLS"):
        open_source(server.url.replace("http://", "https://") + "/model.tensors", ACCESS)


def test_redirects_are_followed_without_the_credentials(
    server: RangeServer, tmp_path: Path, data: bytes
) -> None:
    """F17: another host learns nothing."""
    with RangeServer(tmp_path) as other:
        server.redirects["moved"] = f"{other.url}/model.tensors"
        source = open_source(server.url.replace("//", "//user:canary@") + "/moved", ACCESS)
        assert source.read(0, SIZE) == data
        assert server.requests[0][1]["Authorization"].startswith("Basic ")
        assert all("Authorization" not in headers for _, headers in other.requests)
        assert "canary" not in source.name


def test_endless_redirects_end(server: RangeServer) -> None:
    """F17."""
    server.redirects["loop"] = "/loop"
    with pytest.raises(SourceUnavailableError, match="redirects"):
        open_source(f"{server.url}/loop", ACCESS)


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest", "http://[fe80::1]/x"])
def test_link_local_addresses_are_refused(server: RangeServer, target: str) -> None:
    """A8: by URI and by redirect, before anything is sent there."""
    with pytest.raises(ConfigurationError, match="link-local"):
        open_source(target, ACCESS)
    server.redirects["evil"] = target
    with pytest.raises(ConfigurationError, match="link-local"):
        open_source(f"{server.url}/evil", ACCESS)


def test_a_redirect_to_a_file_is_refused(server: RangeServer) -> None:
    """F17: only HTTP leads to HTTP."""
    server.redirects["file"] = "file:///etc/passwd"
    with pytest.raises(ConfigurationError, match="not HTTP"):
        open_source(f"{server.url}/file", ACCESS)


def test_an_empty_object_has_no_bytes(server: RangeServer, tmp_path: Path) -> None:
    """A 416 to the first range means that there is nothing."""
    (tmp_path / "empty").write_bytes(b"")
    source = open_source(f"{server.url}/empty", ACCESS)
    assert (source.size, source.read(0, 0)) == (0, b"")


def test_bytes_beyond_the_end_are_refused_without_asking(server: RangeServer) -> None:
    """An index that lies must not become a request."""
    source = open_source(f"{server.url}/model.tensors", ACCESS)
    before = len(server.requests)
    with pytest.raises(CorruptError, match="beyond its end"):
        source.read(SIZE - 10, 11)
    assert len(server.requests) == before
