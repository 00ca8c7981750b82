"""How is a request sent whose whole answer is wanted: a page of a listing, a step of an upload?

With the connections, checks, retries and renewals of a range (http.py), but without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import urllib3
from urllib3.exceptions import HTTPError

from tensorserve.errors import PermissionDeniedError, SourceUnavailableError
from tensorserve.sources.base import Access, ForbiddenError, NotFoundError, Unobserved
from tensorserve.sources.cloud_account import CloudSigner
from tensorserve.sources.connection_pools import Pools
from tensorserve.sources.http_body import (
    Closing,
    as_passing,
    asks_for_a_password,
    invalid_header,
    read_small_body,
)
from tensorserve.sources.library_logs import hold_back
from tensorserve.sources.proxies import ProxyRule
from tensorserve.sources.retry import TRANSIENT, Attempts, TryAgain, transient
from tensorserve.sources.tuning import DEFAULTS


@dataclass(frozen=True)
class Answer:
    """A response with a status below 300."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Calls:
    """Sends requests about the object or prefix `name`. Thread-safe; close it at the end."""

    def __init__(
        self, access: Access, signer: CloudSigner, name: str, rule: ProxyRule | None = None
    ) -> None:
        """`rule` selects the proxy, by default as the environment says."""
        hold_back()
        self._policy = access.policy
        self._signer = signer
        self._name = name
        self._pools = Pools(access, None, rule or ProxyRule())

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | bytearray = b"",
        *,
        also: frozenset[int] = frozenset(),
    ) -> Answer:
        """The whole answer to one request; statuses `also` are answers too.

        Raises the sources' errors.
        """
        attempts = Attempts(self._policy, Unobserved(), self._name)
        while True:
            generation = self._signer.generation
            try:
                try:
                    return self._attempt(method, url, headers or {}, body, also)
                except PermissionDeniedError:
                    if not attempts.may_renew() or not self._signer.refresh(generation):
                        raise
            except TryAgain as cause:
                attempts.failed(cause)

    def once(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | bytearray = b""
    ) -> Answer:
        """The same with one attempt. Raises TryAgain where another may succeed, and the sources'
        errors."""
        return self._attempt(method, url, headers, body, frozenset())

    def close(self) -> None:
        """Closes all connections."""
        self._pools.clear()

    def _attempt(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | bytearray,
        also: frozenset[int],
    ) -> Answer:
        signed = self._signer.sign(url, headers, method, len(body))
        try:
            response = self._pools.send(method, url, signed, as_written=True, body=body)
            with Closing(response):
                answer = self._answer(response)
        except (HTTPError, OSError) as error:
            raise as_passing(
                error,
                url,
                self._name,
                self._policy.stall_timeout,
                proxy=self._pools.proxy_host(url),
            ) from error
        except ValueError:
            # Python's message shows the header with the signature.
            raise invalid_header(self._name, "Check the credentials.") from None
        if answer.status < 300 or answer.status in also:
            return answer
        raise self._error(answer)

    def _answer(self, response: urllib3.BaseHTTPResponse) -> Answer:
        limit = DEFAULTS.most_answer_bytes if response.status < 300 else DEFAULTS.most_error_bytes
        text = read_small_body(response, self._policy.stall_timeout, limit)
        if response.status < 300 and len(text) == limit:
            raise SourceUnavailableError(f"{self._name}: an answer has more than {limit} bytes.")
        return Answer(response.status, response.headers, text)

    def _error(self, answer: Answer) -> Exception:
        status = answer.status
        if status == 407:
            return asks_for_a_password(self._name)
        explained = self._signer.explain(status, answer.headers, answer.body)
        if explained is not None:
            return explained
        if status in TRANSIENT:
            return transient(status, answer.headers)
        if status in {401, 403}:
            return ForbiddenError(f"{self._name}: the server refuses it (status {status}).")
        if status in {404, 410}:
            return NotFoundError(f"{self._name} does not exist (status {status}).")
        return SourceUnavailableError(f"{self._name}: the server answers {status}.")
