"""How do requests to a cloud carry credentials that are shared, and renewed once for all?"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from tensorserve.secret import redact_text

Explain = Callable[[int, Mapping[str, str], bytes], Exception | None]
_Access = TypeVar("_Access")
_Account = TypeVar("_Account")
_SAID = 300  # characters of a library's message


class CloudAccount(ABC):
    """The credentials for one kind of storage. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.generation = 0
        """The number of renewals, which identifies the credentials in use."""

    @abstractmethod
    def authorized(
        self, method: str, url: str, headers: Mapping[str, str], length: int
    ) -> dict[str, str]:
        """`headers` and those that let the request pass; `length` is its body's, in bytes.

        Raises TryAgain if the credentials' provider cannot be reached, PermissionDeniedError if it
        refuses, ConfigurationError if it is configured wrongly.
        """

    def renew(self, refused: int) -> bool:
        """Gets credentials newer than generation `refused`; False if there are none.

        Raises as `authorized`.
        """
        with self.lock:
            if self.generation != refused:
                return True  # another thread has renewed them already
            if not self._renewed():
                return False
            self.generation += 1
            return True

    @abstractmethod
    def _renewed(self) -> bool:
        """Replaces the credentials, whatever they say of their expiry; False if they are the same.

        Called with the lock held.
        """


class Shared(Generic[_Access, _Account]):
    """Gives the account for some settings, one for equal ones: credentials are found once.

    Thread-safe. Raises what `make` raises.
    """

    def __init__(self, make: Callable[[_Access], _Account]) -> None:
        self._make = make
        self._accounts: dict[_Access, _Account] = {}
        self._lock = threading.Lock()

    def __call__(self, access: _Access) -> _Account:
        with self._lock:
            if access not in self._accounts:
                self._accounts[access] = self._make(access)
            return self._accounts[access]


def said(message: object) -> str:
    """What a cloud's library says, for a line of a message: short, printable, without secrets."""
    text = " ".join(str(message).split())
    return redact_text("".join(c for c in text if c.isprintable())[:_SAID]).rstrip(".")


class CloudSigner:
    """A `Signer` (http.py) for one object: the account's credentials, and what refusals mean."""

    def __init__(self, account: CloudAccount, explain: Explain) -> None:
        self._account = account
        self._explain = explain

    @property
    def generation(self) -> int:
        """As `Signer.generation`."""
        return self._account.generation

    def sign(
        self, url: str, headers: Mapping[str, str], method: str = "GET", length: int = 0
    ) -> Mapping[str, str]:
        """As `Signer.sign`, also for other methods, with a body of `length` bytes."""
        return self._account.authorized(method, url, headers, length)

    def refresh(self, refused: int) -> bool:
        """As `Signer.refresh`."""
        return self._account.renew(refused)

    def explain(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception | None:
        """As `Signer.explain`."""
        return self._explain(status, headers, body)
