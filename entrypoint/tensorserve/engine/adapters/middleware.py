"""What must happen around the requests of vLLM's API server, so that adapters can be found?

The store of adapters is made before the first request. Each request notes which adapters it uses,
so that none is freed before its answer is complete. vLLM's routes that load any directory, which
come with its resolver interface, answer 404 as if they were not there.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

from tensorserve.engine.adapters.entry import REQUEST, Entry
from tensorserve.engine.adapters.serving import serving
from tensorserve.engine.api_key import App, Receive, Scope, Send
from tensorserve.errors import TensorserveError

# entrypoints/serve/lora/api_router.py (0.32.0), and SageMaker's names of the same.
_ROUTES = frozenset({"load_lora_adapter", "unload_lora_adapter"})
_SAGEMAKERS = "/adapters"
_NOT_FOUND = json.dumps({"detail": "Not Found"}).encode()  # as for any unknown path


class ServeAdapters:
    """ASGI middleware, for `vllm serve --middleware` (config/adapter_flags.py)."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            state: Any = scope["app"].state
            try:
                serving.begin(state)
            except (TensorserveError, AttributeError, KeyError, TypeError) as error:
                # uvicorn takes an exception for an application without a lifespan, and serves.
                await receive()
                message = f"tensorserve: adapters cannot be served: {error!r}"
                await send({"type": "lifespan.startup.failed", "message": message})
                return
            try:
                await self._app(scope, receive, send)
            finally:
                await serving.end()
            return
        if is_closed(scope):
            await _refuse(send)
            return
        used: list[Entry] = []
        whole, left = False, False

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            left = left or (not whole and message["type"].endswith(".disconnect"))
            return message

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal whole
            last = message["type"] == "http.response.body" and not message.get("more_body")
            whole = whole or (last and not left)
            await send(message)

        token = REQUEST.set(used)
        try:
            await self._app(scope, receiving, sending)
        finally:
            REQUEST.reset(token)
            if serving.store is not None:
                serving.store.answered(used, whole=whole)


def is_closed(scope: Scope) -> bool:
    """Whether the request is for a route that loads or unloads adapters."""
    if scope["type"] != "http":
        return False
    path: str = scope.get("path", "").rstrip("/")
    root: str = scope.get("root_path") or ""
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    return (
        path.rpartition("/")[2] in _ROUTES
        or path == _SAGEMAKERS
        or path.startswith(f"{_SAGEMAKERS}/")
    )


async def _refuse(send: Send) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_NOT_FOUND)).encode()),
    ]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": _NOT_FOUND})
