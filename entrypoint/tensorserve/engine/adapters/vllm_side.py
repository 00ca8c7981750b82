"""What of vLLM 0.32.0 do adapters touch that are found while it serves?

Its API server keeps the adapters that it has found in `OpenAIServingModels.lora_requests`, a dict,
for ever (entrypoints/openai/models/serving.py). This dict is replaced by one that tells the store
who looks into it. Can go when vLLM's resolver interface knows of an end, and of hits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

_MOST_LOCKS = 256


class Watched(dict[str, Any]):
    """{name: LoRARequest}; tells `watcher` of what is read and written."""

    def __init__(self, content: dict[str, Any], watcher: Watcher) -> None:
        super().__init__(content)
        self._watcher = watcher

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if found and isinstance(name, str):
            self._watcher.touched(name)
        return found

    def __getitem__(self, name: str) -> Any:
        request = super().__getitem__(name)
        self._watcher.used(name, request.lora_int_id)
        return request

    def __setitem__(self, name: str, request: Any) -> None:
        super().__setitem__(name, request)
        self._watcher.loaded(name, request.lora_path, request.lora_int_id)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._watcher.unloaded(name)

    def forget(self, name: str) -> None:
        """Remove `name` without telling."""
        self.pop(name, None)


class Watcher(Protocol):
    """The store, as the dict sees it (engine/adapters/store.py)."""

    def touched(self, name: str) -> None: ...
    def used(self, name: str, lora_id: int) -> None: ...
    def loaded(self, name: str, directory: str, lora_id: int) -> None: ...
    def unloaded(self, name: str) -> None: ...


class VllmEngine:
    """The store's `Engine`: vLLM's API server and its engine."""

    def __init__(self, state: Any) -> None:
        """`state`: of vLLM's app (entrypoints/launchers/api_server/app_state.py)."""
        self._models = state.openai_serving_models
        self._client = state.engine_client
        # v1/engine/output_processor.py: every request until its last output, or until it is
        # aborted.
        self._requests: dict[str, Any] = self._client.output_processor.request_states

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Tell `watcher` of vLLM's adapters from now on. Gives the function that ends it."""
        watched = Watched(self._models.lora_requests, watcher)
        self._models.lora_requests = watched

        def end() -> None:
            self._models.lora_requests = dict(watched)

        return end

    def forget(self, name: str) -> None:
        """As Engine.forget."""
        requests = self._models.lora_requests
        if isinstance(requests, Watched):
            requests.forget(name)

    def tidy(self) -> None:
        """As Engine.tidy. vLLM keeps a lock for every name that anybody has asked for."""
        locks = self._models.lora_resolver_lock
        if len(locks) > _MOST_LOCKS:
            # One that is not locked has nobody waiting, and is made again when it is asked for.
            for name in [name for name, lock in locks.items() if not lock.locked()]:
                del locks[name]

    def uses(self, lora_id: int) -> bool:
        """As Engine.uses."""
        return any(
            getattr(state.lora_request, "lora_int_id", None) == lora_id
            for state in self._requests.values()
        )

    async def unload(self, lora_id: int) -> None:
        """As Engine.unload. An adapter that vLLM has dropped itself is no error."""
        await self._client.remove_lora(lora_id)
