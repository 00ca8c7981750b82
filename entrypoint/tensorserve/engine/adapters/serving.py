"""Who makes the store of adapters in vLLM's API server, and looks at it from time to time?"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tensorserve.bundle.adapter_fit import BaseModel
from tensorserve.config.settings import Settings
from tensorserve.config.variables import HANDOFF_VARIABLE
from tensorserve.engine.adapters.counts import AdapterCounts
from tensorserve.engine.adapters.entry import Limits
from tensorserve.engine.adapters.source import AdapterSource
from tensorserve.engine.adapters.store import AdapterStore
from tensorserve.engine.adapters.vllm_side import VllmEngine
from tensorserve.launch.context import receive_start
from tensorserve.telemetry import EventLog, events_path

# Beside the model's directory, in TENSORSERVE_STATE_DIR.
_FOLDER = "found-adapters"
_SECONDS_BETWEEN_LOOKS = 1.0


class Serving:
    """The adapters of this process, once its server has begun."""

    def __init__(self) -> None:
        self.store: AdapterStore | None = None
        self.base_name: str | None = None
        """Under which the model is served."""
        self._looks: asyncio.Task[None] | None = None
        self._end_watch: Callable[[], None] | None = None

    def begin(self, state: Any) -> None:
        """Called by vLLM's server before its first request. `state`: of its app.

        Raises TensorserveError, and what vLLM raises where it is not the one that this was
        written for: then nothing is served.
        """
        if self.store is not None:
            return
        start = receive_start(os.environ[HANDOFF_VARIABLE])
        settings = start.settings
        models, config = state.openai_serving_models, state.vllm_config
        names = frozenset(path.name for path in models.base_model_paths)
        base = BaseModel.at(
            start.plan.model_dir,
            names,
            config.lora_config.max_lora_rank,
            config.model_config.get_vocab_size(),
        )
        engine = VllmEngine(state)
        self.base_name = start.plan.served_name
        self.store = AdapterStore(
            AdapterSource(settings, base, settings.state_dir / _FOLDER),
            engine,
            limits_of(settings),
            AdapterCounts(EventLog(events_path(settings.state_dir)).emit),
        )
        self._end_watch = engine.watch(self.store)
        self._looks = asyncio.create_task(_look(self.store))

    async def end(self) -> None:
        """Called when the server has answered its last request."""
        store, looks, end_watch = self.store, self._looks, self._end_watch
        if store is None or looks is None or end_watch is None:
            return
        looks.cancel()
        with suppress(asyncio.CancelledError):
            await looks
        end_watch()
        store.close()
        self.store = None


serving = Serving()


def limits_of(settings: Settings) -> Limits:
    """The bounds that the user has set."""
    return Limits(
        allowed=settings.adapters_allow,
        ttl=settings.adapters_ttl,
        count=settings.adapters_count,
        memory=settings.adapters_memory,
    )


async def _look(store: AdapterStore) -> None:
    while True:
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
        try:
            store.look()
        # A fault in one look must not end all looks: removed adapters would be served for ever.
        except Exception as error:  # noqa: BLE001
            print(
                f"tensorserve: warning: adapters could not be looked after: {error!r}",
                file=sys.stderr,
                flush=True,
            )
