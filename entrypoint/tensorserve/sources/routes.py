"""By which way does a request go: through which proxy, with which target, to which addresses?"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

from urllib3.util import parse_url

from tensorserve.sources.base import Access
from tensorserve.sources.proxies import Proxy, ProxyRule
from tensorserve.sources.ssrf_guard import host_and_port, refuse_written, resolve


@dataclass(frozen=True)
class Route:
    """One scheme, host and port, and how they are reached."""

    scheme: str
    host: str
    port: int
    proxy: Proxy | None

    @cached_property
    def place(self) -> tuple[str, str, int, str | None]:
        """What connections have in common that may be used for one another."""
        return self.scheme, self.host, self.port, self.proxy.url if self.proxy else None

    @property
    def dialled(self) -> tuple[str, int]:
        """(host, port) that a connection is made to: the proxy's, if there is one."""
        if self.proxy is None:
            return self.host, self.port
        return host_and_port(self.proxy.url, "The proxy")


class Routes:
    """The routes of one source. Thread-safe."""

    def __init__(self, access: Access, rule: ProxyRule) -> None:
        self._access = access
        self._rule = rule
        self._proxies: dict[str, Proxy | None] = {}
        self._latest: tuple[str, Route] | None = None
        """The ranges of an object have one URL."""
        self._lock = threading.Lock()

    def route(self, url: str) -> Route:
        """The route to `url`. Raises ConfigurationError for a forbidden host behind a proxy."""
        latest = self._latest
        if latest is not None and latest[0] == url:
            return latest[1]
        proxy = self.proxy(url)
        host, port = host_and_port(url, "The address")
        if proxy is not None:
            refuse_written(host, self._access.allowed_hosts)
        route = Route(urlsplit(url).scheme, host, port, proxy)
        self._latest = url, route
        return route

    def proxy(self, url: str) -> Proxy | None:
        """The proxy for `url`."""
        parts = urlsplit(url)
        place = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            if place not in self._proxies:
                self._proxies[place] = self._rule.proxy(url)
            return self._proxies[place]

    def addresses(self, host: str, port: int, proxy: Proxy | None) -> tuple[str, ...]:
        """The checked addresses of `host`; `proxy`: the one that is dialled, if any."""
        allowed = self._access.allowed_hosts
        if proxy is not None:
            # The operator configured the proxy, not a bundle, so that any address is allowed.
            allowed |= {host_and_port(proxy.url, "The proxy")[0]}
        return resolve(host, port, allowed)


def target(url: str, proxy: Proxy | None, *, as_written: bool) -> str:
    """What stands in the request's first line.

    `as_written`: the path is signed and must not be normalised (`a/../b`, `a//b`).
    """
    if proxy is not None and url.lower().startswith("http:"):
        return url  # a proxy for plain HTTP needs the whole URL
    if as_written:
        parts = urlsplit(url)
        return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parse_url(url).request_uri
