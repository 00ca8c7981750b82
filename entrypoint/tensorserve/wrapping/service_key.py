"""What have keys of services in common: a name that the manifest may give, and waiting?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

from tensorserve.sources.base import Unobserved
from tensorserve.sources.retry import Attempts, TryAgain
from tensorserve.wrapping.base import Provider, Services

_Answer = TypeVar("_Answer")


class ServiceKey(Provider):
    """A wrapping key that never leaves its service, which is asked over the network."""

    def __init__(self, key: str, services: Services) -> None:
        """`key`: the key's name; empty: that of the entry which is unwrapped."""
        self._key = key
        self.services = services

    @property
    def key(self) -> str:
        """As Provider.key: the name that the user gave."""
        return self._key

    def describe(self, key: str = "") -> str:
        """As Provider.describe."""
        return self.named(self._key or key)

    @abstractmethod
    def named(self, key: str) -> str:
        """The key called `key`, with its kind and where it is asked for, for messages."""

    def asked(self, key: str, ask: Callable[[], _Answer]) -> _Answer:
        """What `ask` gives; again and again while it raises TryAgain, within the policy's deadline.

        Raises SourceUnavailableError at the deadline (TENSORSERVE_FETCH_DEADLINE), and what else
        `ask` raises.
        """
        attempts = Attempts(self.services.policy, Unobserved(), self.named(key))
        while True:
            try:
                return ask()
            except TryAgain as cause:
                attempts.failed(cause)
