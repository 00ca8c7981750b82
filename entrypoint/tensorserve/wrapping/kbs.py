"""A wrapping key that CoCo's key broker releases, by the guest's Confidential Data Hub.

https://github.com/confidential-containers/guest-components, api-server-rest: GET
/cdh/resource/REPOSITORY/TYPE/TAG on this machine. The hub attests the guest and knows its broker;
both are the guest's own configuration. The resource is the wrapping key of `file:` recipients: 32
bytes. Nobody wraps through a broker, so that it is only asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
    WrongKeyError,
)
from tensorserve.secret import Secret
from tensorserve.sources.cloud_account import CloudAccount, said
from tensorserve.sources.proxies import ProxyRule
from tensorserve.sources.retry import TryAgain
from tensorserve.wrapping.base import Binding, Provider, Reference, Services, WrappedKey
from tensorserve.wrapping.file import FileKey, wrapping_key
from tensorserve.wrapping.rest import Endpoint, because
from tensorserve.wrapping.service_key import ServiceKey

_PART = r"(?!\.+(?:/|$))[A-Za-z0-9_.-]+"
_RESOURCE = re.compile(rf"{_PART}/{_PART}/{_PART}")
# A guest whose agents are still starting answers 500, as does a broker that refuses.
_MOST_FAILURES = 6


class _NoCredentials(CloudAccount):
    """What the hub asks for: the request's coming from this machine."""

    def authorized(
        self, method: str, url: str, headers: Mapping[str, str], length: int
    ) -> dict[str, str]:
        """As `CloudAccount.authorized`."""
        del method, url, length
        return dict(headers)

    def _renewed(self) -> bool:
        return False


class _Resource(ServiceKey):
    kind = "kbs"
    proves_sender = True

    def __init__(self, key: str, services: Services) -> None:
        """`key`: REPOSITORY/TYPE/TAG."""
        super().__init__(key, services)
        # Never through a proxy: the key would go to it in clear.
        self._endpoint = Endpoint(_NoCredentials(), services, ProxyRule.of({}))
        self._found: FileKey | None = None
        self._failures = 0

    def named(self, key: str) -> str:
        """As ServiceKey.named."""
        return f"kbs:///{key} at {self.services.cdh_url}"

    def opens(self, entry: WrappedKey) -> bool:
        """As Provider.opens: recipients of `file:`, whose wrapping key the resource is."""
        return entry.provider == FileKey.kind

    def wrap(self, model_key: Secret, binding: Binding) -> str:  # noqa: ARG002 - its interface
        """Raises ConfigurationError: a broker only releases."""
        raise _no_wrapping(str(self.key))

    def unwrap(self, entry: WrappedKey, binding: Binding) -> bytes:
        """As Provider.unwrap."""
        if self._found is None:
            url = f"{self.services.cdh_url}/cdh/resource/{self.key}"
            name = self.describe()
            data = self.asked(self.key, lambda: self._endpoint.get(url, name, self._explain))
            self._found = FileKey(wrapping_key(Secret(data, name)))
        if self._found.key != entry.key:
            raise WrongKeyError(
                f"{self.describe()} is the wrapping key {self._found.key}; the model's key is "
                f"wrapped for {entry}.",
                hint="Store that wrapping key as the resource, or have somebody with the model's "
                "key add this one: `tensorserve rewrap URI --add file:PATH`.",
            )
        return self._found.unwrap(entry, binding)

    def _explain(self, status: int, _headers: Mapping[str, str], body: bytes) -> Exception | None:
        """As sources.cloud_account.Explain."""
        name, why = self.describe(), because(said(body.decode(errors="replace")))
        if status == 500:
            self._failures += 1
            if self._failures < _MOST_FAILURES:
                return TryAgain("key_service", f"it answers 500{why}")
            return SourceUnavailableError(
                f"{name}: the hub does not get the resource from its broker{why}.",
                hint="Check that the resource is there, and that the broker's policy releases it "
                "to this guest's measurement; the broker's log says which it was.",
            )
        if status == 403:
            return PermissionDeniedError(
                f"{name}: the hub refuses it{why}.",
                hint="It answers requests from its own guest alone, and only if its resource "
                "interface is on (agent.guest_components_rest_api=resource or all).",
            )
        if status == 404:
            return ConfigurationError(
                f"{name}: the hub has no such interface{why}.",
                hint="Switch it on: agent.guest_components_rest_api=resource (or all) among the "
                "guest's kernel parameters.",
            )
        return None


def to_wrap(reference: Reference, services: Services) -> Provider:  # noqa: ARG001 - as others have it
    """Raises ConfigurationError: a broker only releases."""
    raise _no_wrapping(reference.key.strip("/"))


def to_unwrap(reference: Reference, services: Services) -> Provider:
    """The resource of kbs:///REPOSITORY/TYPE/TAG. Raises ConfigurationError."""
    return _Resource(_path(reference), services)


def place(reference: Reference, services: Services) -> str:
    """Where it would be asked, for `plan`. Raises ConfigurationError."""
    _path(reference)
    return f"for recipients of `file:`, by the Confidential Data Hub at {services.cdh_url}"


def _path(reference: Reference) -> str:
    path = reference.key.removeprefix("/")
    if reference.host is not None:
        raise ConfigurationError(
            f"{str(reference)[:200]} names a broker, which the guest's Confidential Data Hub does.",
            hint="Without a host: kbs:///REPOSITORY/TYPE/TAG.",
        )
    if not _RESOURCE.fullmatch(path):
        raise ConfigurationError(
            f"{str(reference)[:200]} names no resource of a key broker.",
            hint="It has three parts: kbs:///default/wrapping-key/models.",
        )
    return path


def _no_wrapping(path: str) -> ConfigurationError:
    return ConfigurationError(
        f"kbs:///{path[:200]}: a key broker releases keys to attested guests; nothing is wrapped "
        "through it.",
        hint="Wrap with the same wrapping key in a file, `--wrap file:PATH`, and store that file "
        "as the broker's resource.",
    )
