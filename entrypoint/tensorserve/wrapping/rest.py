"""How is a key service asked over REST: one request, whose refusals the provider explains?"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

from tensorserve.bounded_json import read_json
from tensorserve.errors import SourceUnavailableError
from tensorserve.sources.base import Access
from tensorserve.sources.calls import Calls
from tensorserve.sources.cloud_account import CloudAccount, CloudSigner, Explain, said
from tensorserve.sources.proxies import ProxyRule
from tensorserve.wrapping.base import Services


class Endpoint:
    """A service, and the credentials for it. Redirects are not followed."""

    def __init__(
        self, account: CloudAccount, services: Services, rule: ProxyRule | None = None
    ) -> None:
        """`rule` selects the proxy, by default as the environment says."""
        self._account, self._services, self._rule = account, services, rule

    def get(self, url: str, name: str, explain: Explain) -> bytes:
        """What is at `url`. Raises TryAgain where another attempt may succeed, and what `explain`
        makes of a refusal. `name` is the key's, for messages."""
        return self._once("GET", url, name, explain, {}, b"")

    def post(
        self, url: str, name: str, explain: Explain, document: Mapping[str, object]
    ) -> dict[str, object]:
        """The JSON object that answers `document`. Raises as `get`, and SourceUnavailableError for
        an answer that is none."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        text = self._once("POST", url, name, explain, headers, json.dumps(document).encode())
        try:
            found = read_json(text)
        except ValueError:
            found = None  # not shown: it may be a key in a form that is not known
        if not isinstance(found, dict):
            raise no_service(name)
        return found

    def _once(
        self,
        method: str,
        url: str,
        name: str,
        explain: Explain,
        headers: Mapping[str, str],
        body: bytes,
    ) -> bytes:
        signer = CloudSigner(self._account, explain)
        calls = Calls(Access(policy=self._services.policy), signer, name, self._rule)
        try:
            return calls.once(method, url, headers, body).body
        finally:
            calls.close()


def refusal(body: bytes) -> tuple[str, str]:
    """(code or status, message) of Google's and Azure's error documents; empty where there is
    none."""
    try:
        document = read_json(body)
    except ValueError:
        return "", ""
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return "", ""
    inner = error.get("innererror")
    code = inner.get("code") if isinstance(inner, dict) else None
    code = code or error.get("status") or error.get("code") or ""
    return said(code), said(error.get("message") or "")


def because(text: str) -> str:
    """`text` as the end of a sentence."""
    return f": {text}" if text else ""


def base64_field(answer: Mapping[str, object], field: str, name: str, *, urlsafe: bool) -> bytes:
    """The bytes in a member of an answer. Raises SourceUnavailableError where there are none."""
    text = answer.get(field)
    try:
        if not isinstance(text, str):
            raise ValueError("no text")
        # Azure leaves the padding out.
        padded = text + "=" * (-len(text) % 4) if urlsafe else text
        return base64.b64decode(padded, b"-_" if urlsafe else None, validate=True)
    except ValueError as error:
        raise no_service(name) from error


def no_service(name: str) -> SourceUnavailableError:
    """The error for an answer that such a service does not give."""
    return SourceUnavailableError(
        f"{name}: what answers is no such service.",
        hint="Check the host, and whether a proxy answers in its place.",
    )
