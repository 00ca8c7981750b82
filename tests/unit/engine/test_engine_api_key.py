"""With an API key, every route of vLLM's own server asks for it, whatever its name will be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from tensorserve.config.launch_plan import API_KEY_MIDDLEWARE, make_plan
from tensorserve.config.settings import Settings
from tensorserve.engine.api_key import OPEN_PATHS, RequireKey
from tensorserve.errors import ConfigurationError

KEY = "sk-canary"
URI = {"TENSORSERVE_MODEL_URI": "/models/m", "TENSORSERVE_STATE_DIR": "/run/ts"}


def ask(app: Any, path: str, method: str = "GET", kind: str = "http", **more: Any) -> list[Any]:
    """What an ASGI server would send on for one request: [(message type, status or code)]."""
    sent: list[Any] = []
    headers = more.pop("headers", {})
    scope = {
        "type": kind,
        "path": path,
        "raw_path": path.encode(),
        "method": method,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http" if kind == "http" else "ws",
        "http_version": "1.1",
        "root_path": "",
        **more,
    }
    if kind == "websocket":
        del scope["method"]

    async def receive() -> dict[str, Any]:
        if kind == "websocket":
            return {"type": "websocket.connect"}
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append((message["type"], message.get("status", message.get("code"))))

    asyncio.run(app(scope, receive, send))
    return sent


def status(app: Any, path: str, method: str = "GET", **more: Any) -> int:
    return ask(app, path, method, **more)[0][1]


def guarded(**state: Any) -> Any:
    """The middleware around an application that answers 200 to anything."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    args = SimpleNamespace(api_key=[KEY, "second"], **state)
    middleware = RequireKey(app)

    async def with_app(scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = SimpleNamespace(state=SimpleNamespace(args=args))
        await middleware(scope, receive, send)

    return with_app


@pytest.fixture(scope="module")
def vllm_app() -> Iterator[Any]:
    """vLLM's own application for every task it knows, as the planned arguments make it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.tasks import SupportedTask
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        plan = make_plan(Settings.from_environment({**URI, "TENSORSERVE_VLLM_API_KEY": KEY}))
        planned = [word for word in plan.argv if word.startswith("--middleware")]
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(
            ["m", "--enable-lora", "--api-key", KEY, *planned]
        )
        app = build_app(args, get_args(SupportedTask))
        app.state.engine_client = None  # /health asks it; None is a server without an engine
        yield app


def test_every_route_of_vllm_asks_for_the_key(vllm_app: Any) -> None:
    """Those of /openapi.json and those that it does not list. A new one is guarded as well."""
    asked = [(path, m.upper()) for path, ms in vllm_app.openapi()["paths"].items() for m in ms]
    for route in vllm_app.routes:
        asked += [(route.path, method) for method in getattr(route, "methods", None) or ["GET"]]
    assert {"/invocations", "/tokenize", "/scale_elastic_ep"} <= {path for path, _ in asked}
    open_to_all = {path for path, method in asked if status(vllm_app, path, method) != 401}
    assert open_to_all == OPEN_PATHS


def test_a_websocket_of_vllm_asks_for_the_key(vllm_app: Any) -> None:
    """Closed before it was accepted; with an HTTP answer where the server can give one."""
    assert ask(vllm_app, "/v1/realtime", kind="websocket") == [("websocket.close", 1008)]
    extensions = {"websocket.http.response": {}}
    sent = ask(vllm_app, "/v1/realtime", kind="websocket", extensions=extensions)
    assert sent[0] == ("websocket.http.response.start", 401)


def test_the_key_opens_what_it_guards(vllm_app: Any) -> None:
    """As a bearer token; the scheme's name in any case."""
    for scheme in ("Bearer", "bearer"):
        headers = {"authorization": f"{scheme} {KEY}"}
        assert status(vllm_app, "/openapi.json", headers=headers) == 200


@pytest.mark.parametrize(
    "path",
    ["//health", "/health/", "/health/../v1/models", "/HEALTH", "/health;x", "//v1/models", "", "/",
     "/%68ealth", "/health%2f..%2fv1", "/ping\x00", "/v1/models", "/metrics", "/metrics/"],
)  # fmt: skip
def test_no_other_spelling_of_an_open_path_is_open(path: str) -> None:
    """The list holds whole paths as the router sees them."""
    assert status(guarded(), path) == 401


def test_a_root_path_is_left_away_as_the_router_does_it() -> None:
    """`--root-path /api`: a proxy may leave it in or take it off."""
    assert status(guarded(), "/api/health", root_path="/api") == 200
    assert status(guarded(), "/health", root_path="/api") == 200
    assert status(guarded(), "/apihealth", root_path="/api") == 401
    assert status(guarded(), "/api/v1/models", root_path="/api") == 401


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"Bearer {KEY}", 200),
        ("Bearer second", 200),
        (f"Basic {KEY}", 401),
        (KEY, 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer  {KEY}", 401),
        ("Bearer ", 401),
        ("", 401),
    ],
)
def test_only_a_whole_key_opens(value: str, expected: int) -> None:
    """Any of the keys, and nothing else."""
    assert status(guarded(), "/v1/models", headers={"authorization": value}) == expected


def test_a_preflight_passes_and_another_options_does_not() -> None:
    """A browser asks without the key whether it may ask; a route must not answer OPTIONS so."""
    asks = {"origin": "https://a", "access-control-request-method": "POST"}
    assert status(guarded(), "/v1/models", "OPTIONS", headers=asks) == 200
    assert status(guarded(), "/metrics", "OPTIONS") == 401
    assert status(guarded(), "/metrics", "GET", headers=asks) == 401


def test_without_keys_in_vllm_nothing_is_served() -> None:
    """The middleware is there because a key was set: one that did not arrive opens nothing."""
    app = RequireKey(guarded())
    assert status(app, "/v1/models", headers={"authorization": "Bearer "}) == 401
    with pytest.raises(RuntimeError, match="but vLLM has none"):
        ask(app, "", kind="lifespan")


def test_the_plan_adds_the_guard_after_the_users_own_middleware() -> None:
    """vLLM puts the last one before the others. Without a key there is none."""
    own = {"TENSORSERVE_VLLM_MIDDLEWARE": "their.Own"}
    key = {"TENSORSERVE_VLLM_API_KEY": KEY}
    with_key = make_plan(Settings.from_environment(URI | own | key)).argv
    given = [word for word in with_key if word.startswith("--middleware")]
    assert given == ["--middleware=their.Own", f"--middleware={API_KEY_MIDDLEWARE}"]
    arguments = ("--middleware", "their.Other", "--api-key", KEY)
    from_arguments = make_plan(Settings.from_environment(URI), arguments).argv
    assert from_arguments[-2:] == ("--middleware=their.Other", f"--middleware={API_KEY_MIDDLEWARE}")
    assert API_KEY_MIDDLEWARE not in " ".join(make_plan(Settings.from_environment(URI | own)).argv)


@pytest.mark.parametrize(
    "door",
    [
        {"TENSORSERVE_VLLM_GRPC": "true"},
        {"TENSORSERVE_VLLM_GRPC_PORT": "9000"},
        {"VLLM_USE_RUST_FRONTEND": "1"},
    ],
)
def test_a_door_that_the_key_does_not_guard_is_refused_with_one(door: dict[str, str]) -> None:
    """vLLM's gRPC servers and its Rust front end know no middleware."""
    make_plan(Settings.from_environment(URI | door))
    with pytest.raises(ConfigurationError, match="API key"):
        make_plan(Settings.from_environment(URI | door | {"TENSORSERVE_VLLM_API_KEY": KEY}))
