"""How are requests sent by urllib3: the plain way, where libcurl is not at hand? It is slower."""

from __future__ import annotations

import ssl
import threading
import time
from importlib.metadata import version

import urllib3
from urllib3.exceptions import HTTPError

from tensorserve.sources.base import Access
from tensorserve.sources.connection_pools import Pools
from tensorserve.sources.http_body import (
    Body,
    Closing,
    as_passing,
    invalid_header,
    read_small_body,
)
from tensorserve.sources.proxies import ProxyRule
from tensorserve.sources.retry import TryAgain
from tensorserve.sources.scatter_read import Filling
from tensorserve.sources.transport import Answer, Reply, Request, Verdict


class UrllibTransport:
    """See `Transport`."""

    name = "urllib3"
    counts = False

    def __init__(self, access: Access, ca_bundle: str | None, rule: ProxyRule, source: str) -> None:
        """`source`: the source's name, for messages."""
        openssl = " ".join(ssl.OPENSSL_VERSION.split()[:2])
        self.library = f"urllib3 {version('urllib3')} with {openssl}"
        self._policy = access.policy
        self._pools = Pools(access, ca_bundle, rule)
        self._source = source
        self._bodies: dict[int, Body] = {}
        """The responses that are being read, by thread."""
        self._lock = threading.Lock()

    def get(self, request: Request) -> Reply:
        """See `Transport`."""
        try:
            response = self._pools.send(
                "GET", request.url, request.headers, as_written=request.as_written
            )
        except (HTTPError, OSError) as error:
            raise self._as_passing(error, request.url) from error
        except ValueError:
            # Python's message shows the header with the signature.
            raise invalid_header(self._source) from None
        answer = Answer(response.status, response.headers)
        with Closing(response):
            verdict, filling = request.judge(answer)
            if verdict is Verdict.TAKE and filling is not None:
                self._receive(response, request, filling)
            elif verdict is Verdict.COLLECT:
                return Reply(answer, self._document(response, request.url))
        return Reply(answer)

    def hurry(self, thread: int) -> None:
        """See `Transport`."""
        with self._lock:
            if thread in self._bodies:
                self._bodies[thread].break_off()

    def close(self) -> None:
        """See `Transport`."""
        self._pools.clear()

    def _receive(
        self, response: urllib3.BaseHTTPResponse, request: Request, filling: Filling
    ) -> None:
        """Reads the body into `filling`, which keeps the progress if TryAgain is raised."""
        body = Body(response)
        thread = threading.get_ident()
        with self._lock:
            # A callback for a full part may read another range in this thread.
            outer, self._bodies[thread] = self._bodies.get(thread), body
        try:
            self._receive_body(body, request, filling)
        except TryAgain as cause:
            if body.broken_off:
                raise TryAgain("slow", "the range was late", after=0.0) from cause
            raise
        finally:
            with self._lock:
                if outer is None:
                    del self._bodies[thread]
                else:
                    self._bodies[thread] = outer

    def _receive_body(self, body: Body, request: Request, filling: Filling) -> None:
        window_start, window_bytes = time.monotonic(), 0
        while not filling.finished:
            # The rate's window excludes waiting for memory and the callbacks for full parts, which
            # are not the network's time.
            started = time.monotonic()
            wanted = filling.wanted
            window_start += time.monotonic() - started
            try:
                count = body.fill(wanted)
            except (HTTPError, OSError) as error:
                raise self._as_passing(error, request.url) from error
            if not count:
                raise TryAgain("short_body", "the connection ended before the range did")
            request.received(count)
            window_bytes += count
            now = time.monotonic()
            elapsed = now - window_start
            slow = elapsed >= self._policy.stall_timeout and (
                window_bytes < self._policy.minimum_rate * elapsed
            )
            last = filling.ends_with(count)
            filling.add(count)
            if slow and not last:
                raise TryAgain("stall", "the connection is too slow")
            if elapsed >= self._policy.stall_timeout:
                window_start, window_bytes = time.monotonic(), 0
            else:
                window_start += time.monotonic() - now

    def _document(self, response: urllib3.BaseHTTPResponse, url: str) -> bytes:
        try:
            return read_small_body(response, self._policy.stall_timeout)
        except (HTTPError, OSError) as error:
            raise self._as_passing(error, url) from error

    def _as_passing(self, error: HTTPError | OSError, url: str) -> TryAgain:
        return as_passing(
            error,
            url,
            self._source,
            self._policy.stall_timeout,
            proxy=self._pools.proxy_host(url),
        )
