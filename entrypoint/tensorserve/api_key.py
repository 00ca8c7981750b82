"""Which requests does an API key guard? All of them, but those that tell nothing but "I live".

vLLM's own check covers the paths that begin with /v1, /v2, /inference and /cohere alone
(vllm/entrypoints/serve/middleware/authenticate.py, 0.32.0): /invocations, /tokenize,
/scale_elastic_ep and others answer without a key. This class goes to `vllm serve --middleware`,
and stands before vLLM's. It runs in vLLM's process, so it needs nothing but Python's own library.
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

# What probes ask, and tells nothing of the model or of its users. vLLM's /metrics is not here: it
# names models and adapters, and counts who asks for what.
OPEN_PATHS = frozenset({"/health", "/ping", "/version"})
MIDDLEWARE = f"{__name__}.RequireKey"
"""As `vllm serve --middleware` wants it."""

_REFUSAL = json.dumps({"error": "Unauthorized"}).encode()  # vLLM's own words
_POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


class RequireKey:
    """ASGI middleware: a request has one of vLLM's API keys as its bearer token, or gets 401.

    The keys are those that vLLM was given (`app.state.args.api_key`): they are in memory, and stand
    in no argument. Where there are none, every guarded request is refused: this class is only
    there because a key was set.
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

    Only these paths as they stand: any other spelling (`//health`, `/health/`) is another path to
    the router as well, or not there. What a server has decoded (%2F) is not decoded again.
    """
    path: str = scope.get("path", "")
    root: str = scope.get("root_path") or ""
    # As Starlette's router does it: the root path is left away if it is a whole prefix.
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    return scope["type"] == "http" and path in OPEN_PATHS


def _is_preflight(scope: Scope) -> bool:
    """A browser's question whether it may ask, which never has a key; vLLM's CORS answers it.

    Only with both headers: any other OPTIONS would reach the routes.
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
    if len(given) != 1:  # of two, another part of the server might look at the other one
        return False
    scheme, _, token = given[0].partition(b" ")
    if scheme.lower() != b"bearer":
        return False
    found = False
    digest = _digest(token)
    for expected in _digests(scope):
        # All of them, and in constant time.
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
        "tensorserve: an API key was set, and vLLM does not know it; nothing is served without."
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
