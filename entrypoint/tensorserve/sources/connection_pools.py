"""Which pooled connection does a request of a source use: to the server, or to a proxy?"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import urllib3
from urllib3.util import create_urllib3_context

from tensorserve.errors import ConfigurationError
from tensorserve.sources.base import Access
from tensorserve.sources.header_timeout import watch_connections
from tensorserve.sources.proxies import Proxy, ProxyRule
from tensorserve.sources.routes import Routes, target
from tensorserve.sources.tuning import DEFAULTS


class Pools:
    """The connections of one source. Thread-safe."""

    def __init__(self, access: Access, ca_bundle: str | None, rule: ProxyRule) -> None:
        self._access = access
        self._ca_bundle = ca_bundle
        self._routes = Routes(access, rule)
        self._managers: dict[tuple[str, str | None], urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        as_written: bool,
        body: bytes | bytearray = b"",
    ) -> urllib3.BaseHTTPResponse:
        """Sends a request for `url`. The caller reads the answer's body and follows redirects.

        `as_written`: the path is signed and must not be normalised (`a/../b`, `a//b`). Raises
        urllib3's errors, OSError, and ConfigurationError for a forbidden host (ssrf_guard.py).
        """
        route = self._routes.route(url)
        pool = self._manager(route.proxy, route.scheme).connection_from_url(url)
        return pool.urlopen(
            method,
            target(url, route.proxy, as_written=as_written),
            body=bytes(body) if body else None,
            headers=dict(headers),
            retries=False,
            redirect=False,
            assert_same_host=False,
            preload_content=False,
            decode_content=False,
        )

    def proxy_host(self, url: str) -> str | None:
        """The proxy for `url`, as host:port; None without one."""
        proxy = self._routes.proxy(url)
        return None if proxy is None else proxy.host

    def clear(self) -> None:
        """Close all connections."""
        with self._lock:
            for manager in self._managers.values():
                manager.clear()

    def _manager(self, proxy: Proxy | None, scheme: str) -> urllib3.PoolManager:
        key = (scheme, None if proxy is None else proxy.url)
        with self._lock:
            if key not in self._managers:
                self._managers[key] = self._new_manager(proxy, scheme)
            return self._managers[key]

    def _new_manager(self, proxy: Proxy | None, scheme: str) -> urllib3.PoolManager:
        policy = self._access.policy
        options: dict[str, Any] = {
            "maxsize": self._access.connections,
            "block": False,
            "retries": False,
            "timeout": urllib3.Timeout(connect=policy.connect_timeout, read=policy.stall_timeout),
            "blocksize": DEFAULTS.receive_bytes,
        }
        if scheme == "https":  # one context for all connections: reading CAs takes milliseconds
            options["ssl_context"] = tls_context(self._ca_bundle)
        manager: urllib3.PoolManager
        if proxy is None:
            manager = urllib3.PoolManager(**options)
        else:
            to_proxy = tls_context(self._ca_bundle) if proxy.url.startswith("https:") else None
            manager = urllib3.ProxyManager(
                proxy.url, proxy_headers=dict(proxy.headers), proxy_ssl_context=to_proxy, **options
            )
        watch_connections(manager, lambda host, port: self._routes.addresses(host, port, proxy))
        return manager


def tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    """Trusts `ca_bundle`, by default the system's CAs. Raises ConfigurationError."""
    if ca_bundle is None:
        context = create_urllib3_context()
        context.load_default_certs()
        return context
    try:
        return _trusting(ca_bundle, Path(ca_bundle).stat().st_mtime_ns)
    except OSError as error:
        raise ConfigurationError(
            f"The CA bundle {ca_bundle} cannot be used: {error.strerror or error}.",
            hint="It is named by AWS_CA_BUNDLE, a profile's ca_bundle, REQUESTS_CA_BUNDLE or "
            "SSL_CERT_FILE: a file of certificates in PEM.",
        ) from error


@lru_cache(maxsize=4)
def _trusting(ca_bundle: str, _changed: int) -> ssl.SSLContext:
    context = create_urllib3_context()
    context.load_verify_locations(cafile=ca_bundle)
    return context
