"""Which names were refused a moment ago? The store is not asked for them again so soon."""

from __future__ import annotations

from collections import OrderedDict

from tensorserve.engine.adapters.refusal import AdapterRefused

# What was just uploaded is found after that.
REFUSED_SECONDS = 10.0
_MOST_NAMES = 1024


class RefusedNames:
    """The names of the last seconds; of too many, the oldest are forgotten. `now`: monotonic
    seconds."""

    def __init__(self) -> None:
        self._refused: OrderedDict[str, tuple[float, AdapterRefused]] = OrderedDict()

    def add(self, name: str, refused: AdapterRefused, now: float) -> None:
        """`name` was refused."""
        self._refused[name] = (now + REFUSED_SECONDS, refused)
        self._refused.move_to_end(name)
        while len(self._refused) > _MOST_NAMES:
            self._refused.popitem(last=False)

    def check(self, name: str, now: float) -> None:
        """Raises AdapterRefused, as it was raised before, for a name of the last seconds."""
        until, refused = self._refused.get(name, (0.0, None))
        if refused is not None and now < until:
            raise refused.with_traceback(None)

    def forget(self, now: float) -> None:
        """Those whose time is over."""
        for name, (until, _) in list(self._refused.items()):
            if until <= now:
                del self._refused[name]
