"""How does supervisord start its programs at once? Its first transition is made before its loop.

The loop of stock supervisord waits for a second before its first look at the programs (supervisor
4.3.0, Supervisor.runforever). All else is stock. Can be removed when supervisor does so itself.
"""

from __future__ import annotations

import sys
from typing import Any

from supervisor.medusa import asyncore_25 as asyncore
from supervisor.options import ServerOptions
from supervisor.supervisord import Supervisor

from tensorserve.linux import end_with_parent


class _Prompt(Supervisor):  # type: ignore[misc] # supervisor has no types
    def runforever(self) -> None:
        groups: list[Any] = sorted(self.process_groups.values())
        for group in groups:
            group.transition()
        super().runforever()


def main() -> None:
    """As `supervisord` with the arguments of this process; it ends with `up`, which made it."""
    end_with_parent()
    options = ServerOptions()
    options.realize(sys.argv[1:], doc=__doc__)
    options.first, options.test = True, False
    try:
        _Prompt(options).main()
    except asyncore.ExitNow:
        pass
    finally:
        options.close_logger()


if __name__ == "__main__":
    main()
