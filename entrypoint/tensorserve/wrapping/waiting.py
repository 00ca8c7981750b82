"""How long is a key service waited for that is sealed, busy or away?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tensorserve.sources.base import Unobserved
from tensorserve.sources.retry import Attempts, TryAgain
from tensorserve.wrapping.base import Services

_Answer = TypeVar("_Answer")


def asked_again(name: str, services: Services, ask: Callable[[], _Answer]) -> _Answer:
    """What `ask` gives; again and again while it raises TryAgain, within the policy's deadline.

    `name` is the service, for messages. Raises SourceUnavailableError at the deadline
    (TENSORSERVE_FETCH_DEADLINE), and what else `ask` raises.
    """
    attempts = Attempts(services.policy, Unobserved(), name)
    told = False
    while True:
        try:
            return ask()
        except TryAgain as cause:
            if not told:
                told = True
                services.say(
                    f"waiting for {name}: {cause.message} "
                    f"(up to {services.policy.deadline:.0f} s, TENSORSERVE_FETCH_DEADLINE)"
                )
            attempts.failed(cause)
