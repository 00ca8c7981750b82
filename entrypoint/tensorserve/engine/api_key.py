"""Which requests need an API key? All except health checks and the version.

vLLM's own check covers only paths that begin with /v1, /v2, /inference and /cohere
(vllm/entrypoints/serve/middleware/authenticate.py, 0.32.0): /invocations, /tokenize,
/scale_elastic_ep and others answer without a key. This class is passed to `vllm serve --middleware`
and runs before vLLM's check, in vLLM's process; it imports only Python's standard library.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Paths of health probes, which reveal nothing about the model or its users. vLLM's /metrics is not
# among them: it has the names of models and adapters, and their request counts.
OPEN_PATHS = frozenset({"/health", "/ping", "/version"})

_REFUSAL = json.dumps({"error": "Unauthorized"}).encode()  # as vLLM's own check answers
_POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


class RequireKey:
    """ASGI middleware: answers 401 unless a request's bearer token is one of vLLM's API keys.

    The keys are vLLM's own (`app.state.args.api_key`), read from memory. Without keys, every
    guarded request is refused: the class is only installed if a key is configured.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            if not _digests(scope):
                _no_keys()
        elif not (is_open(scope) or _is_preflight(scope) or _has_key(scope)):
            await _refuse(scope, send)
            return
        await self._app(scope, receive, send)


def is_open(scope: Scope) -> bool:
    """Whether the request is for one of OPEN_PATHS.

    Only these exact paths: other spellings (`//health`, `/health/`) are other paths for the router
    too. The path was percent-decoded once by the server and is not decoded again.
    """
    path: str = scope.get("path", "")
    root: str = scope.get("root_path") or ""
    # As in Starlette's router: a root path that is a whole prefix is removed.
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    return scope["type"] == "http" and path in OPEN_PATHS


def _is_preflight(scope: Scope) -> bool:
    """Whether the request is a CORS preflight, which has no key and is answered by vLLM's CORS.

    Only with both headers: another OPTIONS request would reach the routes.
    """
    names = {name for name, _ in scope.get("headers", ())}
    return (
        scope.get("method") == "OPTIONS"
        and {
            b"origin",
            b"access-control-request-method",
        }
        <= names
    )


def _has_key(scope: Scope) -> bool:
    given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
    if len(given) != 1:  # of two headers, another part of the server might use the other one
        return False
    scheme, _, token = given[0].partition(b" ")
    if scheme.lower() != b"bearer":
        return False
    found = False
    digest = _digest(token)
    for expected in _digests(scope):
        # Every key is compared, in constant time.
        found |= hmac.compare_digest(digest, expected)
    return found


def _digests(scope: Scope) -> list[bytes]:
    args = getattr(getattr(scope.get("app"), "state", None), "args", None)
    keys = getattr(args, "api_key", None) or ()
    return [_digest(key.encode()) for key in keys if key]


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _no_keys() -> NoReturn:
    raise RuntimeError(
        "tensorserve: an API key is configured, but vLLM has none. Nothing is served without it."
    )


async def _refuse(scope: Scope, send: Send) -> None:
    prefix = ""
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        prefix = "websocket."
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_REFUSAL)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": f"{prefix}http.response.start", "status": 401, "headers": headers})
    await send({"type": f"{prefix}http.response.body", "body": _REFUSAL})
