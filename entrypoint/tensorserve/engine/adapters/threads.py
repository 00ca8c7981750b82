"""How does the server's event loop go on while something waits for the store?

Threads of the loop's own pool, and of concurrent.futures, are waited for when a process ends: a
slow store would delay a stop. These are not.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")


async def in_thread(call: Callable[[], Result]) -> Result:
    """What `call` gives or raises, in a thread of its own. The thread goes on if this is
    cancelled."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.done():  # cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        # It is raised where it is waited for.
        except BaseException as raised:  # noqa: BLE001
            error = raised
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="tensorserve-adapter", daemon=True).start()
    return await future
