"""What is a source: an object with a size and a version, of which byte ranges can be read?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from ctypes import c_int64
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from tensorserve.errors import CorruptError, PermissionDeniedError
from tensorserve.secret import Secret
from tensorserve.sources.scatter_read import Filling
from tensorserve.sources.tuning import DEFAULTS


class NotFoundError(CorruptError):
    """The object does not exist, although its bucket or server does."""

    reason = "not_found"


class ForbiddenError(PermissionDeniedError):
    """The server answers 403 without details: access is denied, or the object does not exist.

    Servers that answer 403 for missing objects: S3 without s3:ListBucket, CloudFront in front of
    S3, and web servers that hide their content.
    """


class ReplacedError(CorruptError):
    """The object was replaced after it was opened."""


class Source(ABC):
    """One object, open for reading. Methods may be called by many threads at once."""

    name: str
    """The URI, redacted: fit for messages."""
    size: int
    """Bytes."""
    version: str | None
    """What names this version (an ETag, a file's identity, a date); None if there is nothing."""
    pinned: bool
    """Whether `version` changes with every change of the bytes. A date in seconds does not, a weak
    ETag need not (RFC 9110, 8.8.1): then what two requests give may be of two versions.
    """
    remote: bool
    """Whether requests take time on the way, so that many at once help."""
    long_requests: bool = False
    """Whether one request for tens of MiB is as good as several: nobody waits for the memory of
    what has been read of it.
    """
    transport: str = "file"
    """What brings the bytes, for log and metrics: `file`, `libcurl` or `urllib3`."""
    library: str = ""
    """The same with its version, and that of what does TLS for it; empty for a file."""

    @abstractmethod
    def read_parts(self, offset: int, parts: Filling) -> None:
        """Fill adjacent parts from `offset` on, in one request and in order, or raise one of our
        errors. The calls of `parts` are made in this thread.
        """

    @abstractmethod
    def close(self) -> None:
        """Free connections and descriptors."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` wholly from `offset`, or raise one of our errors."""
        self.read_parts(offset, Filling.of(buffer))

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_again(self, offset: int, buffer: memoryview) -> None:
        """As `read_into`, of bytes that came damaged: from the source itself, not from a cache."""
        self.read_into(offset, buffer)

    def hurry(self, thread: int) -> None:  # noqa: B027 - most have no second way to ask
        """What `thread` (its ident) waits for is late, and should be asked for in another way."""

    def passed(self, offset: int) -> None:  # noqa: B027 - most keep nothing
        """Nothing before `offset` is needed any more, unless it turns out to be damaged."""

    def end_of(self, offset: int, parts: Filling) -> int:
        """Where `parts` from `offset` on end. Raises CorruptError beyond the object's end."""
        stop = offset + parts.length
        if offset < 0 or stop > self.size:
            raise CorruptError(
                f"{self.name}: bytes {offset} to {stop} are beyond its end ({self.size} bytes)."
            )
        return stop


class FetchObserver(Protocol):
    """Receives events of the transport. Called from many threads; must be fast."""

    def request(self) -> None:
        """A request was sent."""

    def retry(self, reason: str) -> None:
        """A request will be retried; `reason` is a short label ("reset", "stall", "status_503")."""

    def received(self, count: int) -> None:
        """`count` payload bytes arrived."""


@runtime_checkable
class CountingObserver(FetchObserver, Protocol):
    """One that reads how many bytes have come while a request is running."""

    def counter(self) -> c_int64:
        """A counter for one connection, in place of `received`: C adds payload bytes to it."""


class Unobserved:
    """An observer that ignores all events."""

    def request(self) -> None: ...
    def retry(self, reason: str) -> None: ...
    def received(self, count: int) -> None: ...


@dataclass(frozen=True)
class RetryPolicy:
    """When a request is retried and when it fails. Times in seconds, rates in bytes per second."""

    attempts: int | None = None
    """The most attempts in a row without progress; None: limited by the deadline only."""
    deadline: float = 300.0
    """Seconds without progress of a range before it fails."""
    connect_timeout: float = 5.0
    """Seconds to establish a connection."""
    stall_timeout: float = 10.0
    """Seconds without data before the connection is dropped."""
    minimum_rate: float = 32 * 1024
    """A connection with a lower average rate over `stall_timeout` is dropped."""
    backoff_base: float = 0.1
    backoff_cap: float = 10.0
    """Seconds; see retry.full_jitter."""


@dataclass(frozen=True)
class S3Access:
    """How S3 is reached. Without keys, botocore's credential chain is used."""

    endpoint_url: str | None = None
    region: str | None = None
    ca_bundle: str | None = None
    addressing_style: str | None = None
    """`virtual`, `path` or `auto`; None: as in the AWS configuration, whose default is `auto`."""
    unsigned: bool = False
    """Requests without credentials and signatures, for public buckets."""
    request_payer: str | None = None
    """`requester`: the credentials' account pays for the traffic."""
    access_key_id: Secret | None = None
    secret_access_key: Secret | None = None
    session_token: Secret | None = None


@dataclass(frozen=True)
class GcsAccess:
    """How Google Cloud Storage is reached: by default with Application Default Credentials."""

    unsigned: bool = False
    """Requests without credentials, for public buckets."""
    emulator_host: str | None = None
    """host:port or URL of an emulator, which gets no credentials."""


@dataclass(frozen=True)
class AzureAccess:
    """How Azure Blob Storage is reached. Without key, SAS and client secret, azure-identity's
    DefaultAzureCredential is used."""

    account: str | None = None
    connection_string: Secret | None = None
    account_key: Secret | None = None
    """Base64."""
    sas_token: Secret | None = None
    """A query string."""
    tenant_id: str | None = None
    client_id: str | None = None
    client_secret: Secret | None = None
    """Of the service principal that the two above name."""


@dataclass(frozen=True)
class HubAccess:
    """How a Hugging Face hub is reached."""

    endpoint: str = "https://huggingface.co"
    token: Secret | None = None


@dataclass(frozen=True)
class Access:
    """How sources of all kinds are reached."""

    s3: S3Access = field(default_factory=S3Access)
    gcs: GcsAccess = field(default_factory=GcsAccess)
    azure: AzureAccess = field(default_factory=AzureAccess)
    hub: HubAccess = field(default_factory=HubAccess)
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    allowed_hosts: frozenset[str] = frozenset()
    """Link-local or metadata hosts that are allowed nevertheless (ssrf_guard.py)."""
    connections: int = DEFAULTS.most_connections
    """How many connections are kept open for the next request."""
