"""Which proxy, if any, is used for a URL? The environment is read as urllib and botocore do.

HTTP_PROXY, HTTPS_PROXY and NO_PROXY; lower-case names take precedence. NO_PROXY has host names,
also as suffixes, and literal addresses, each optionally with `:port`, or `*`; address ranges are
not supported (urllib.request.proxy_bypass_environment). ALL_PROXY is not read.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from tensorserve.errors import ConfigurationError
from tensorserve.sources.ssrf_guard import host_and_port


@dataclass(frozen=True)
class Proxy:
    """A proxy: http:// or https://."""

    url: str
    """The proxy's URL without user info."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Headers that are sent to the proxy only."""

    @property
    def host(self) -> str:
        """host:port, for messages."""
        return urlsplit(self.url).netloc


def parse_proxy(text: str) -> Proxy:
    """The proxy in a variable's value `text`. Raises ConfigurationError, without the user info."""
    url = text if "://" in text else f"http://{text.removeprefix('//')}"
    scheme = url.partition("://")[0].lower()
    if scheme not in {"http", "https"}:
        raise ConfigurationError(
            f"A proxy with the scheme {scheme!r} is not supported.",
            hint="HTTP_PROXY and HTTPS_PROXY name an HTTP proxy: http://host:port.",
        )
    host_and_port(url, "The proxy of HTTP_PROXY or HTTPS_PROXY")
    parts = urlsplit(url)
    headers = {}
    if parts.username and parts.password:  # as botocore: both or none
        info = f"{unquote(parts.username)}:{unquote(parts.password)}"
        headers["Proxy-Authorization"] = f"Basic {b64encode(info.encode()).decode()}"
    return Proxy(f"{scheme}://{parts.netloc.rpartition('@')[2]}", headers)


@dataclass(frozen=True)
class ProxyRule:
    """Selects the proxy for a URL, by default from the environment."""

    _found: Mapping[str, str] | None = field(default=None, repr=False)
    """{scheme: proxy} for `_place`; None: the environment decides."""
    _place: str | None = None

    @classmethod
    def of(cls, proxies: Mapping[str, str]) -> ProxyRule:
        """A rule with {scheme of the URL: proxy}."""
        return cls(dict(proxies))

    @classmethod
    def for_url(cls, url: str) -> ProxyRule:
        """The environment's rule for `url`, applied to other URLs as well."""
        return cls({} if proxy_bypass(_place(url)) else getproxies())

    def held_to(self, place: str) -> ProxyRule:
        """The same rule for `place` (host:port) only; for other places the environment decides."""
        return ProxyRule(self._found, place)

    def proxy(self, url: str) -> Proxy | None:
        """The proxy for `url`, or None. Raises ConfigurationError for an invalid proxy."""
        rule = self
        if self._found is None or (self._place is not None and self._place != _place(url)):
            rule = ProxyRule.for_url(url)
        found = (rule._found or {}).get(urlsplit(url).scheme)
        return parse_proxy(found) if found else None


def _place(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]
