"""What happens around the requests of vLLM's API server, where adapters are found."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tensorserve.engine.adapters.entry import REQUEST
from tensorserve.engine.adapters.middleware import ServeAdapters, is_closed
from tensorserve.engine.adapters.vllm_side import VllmEngine, Watched


class Watcher:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def touched(self, name: str) -> None:
        self.told.append(("touched", name))

    def used(self, name: str, lora_id: int) -> None:
        self.told.append(("used", name, lora_id))

    def loaded(self, name: str, directory: str, lora_id: int) -> None:
        self.told.append(("loaded", name, directory, lora_id))

    def unloaded(self, name: str) -> None:
        self.told.append(("unloaded", name))


def request(lora_id: int, path: str = "/x") -> Any:
    return SimpleNamespace(lora_int_id=lora_id, lora_path=path)


def test_the_dict_tells_who_looks_into_it() -> None:
    """And is a dict for vLLM."""
    watcher = Watcher()
    watched = Watched({"static": request(1)}, watcher)
    watched["sql"] = request(2)
    assert "sql" in watched
    assert "new" not in watched
    assert watched["sql"].lora_int_id == 2
    assert [one.lora_int_id for one in watched.values()] == [1, 2]
    del watched["sql"]
    watched.forget("static")
    watched.forget("static")
    assert watcher.told == [
        ("loaded", "sql", "/x", 2), ("touched", "sql"), ("used", "sql", 2), ("unloaded", "sql"),
    ]  # fmt: skip
    assert dict(watched) == {}


def test_the_engines_requests_are_those_that_vllm_has() -> None:
    """Until their last output."""
    states: dict[str, Any] = {"1": SimpleNamespace(lora_request=None)}
    unloaded: list[int] = []

    async def remove_lora(lora_id: int) -> None:
        unloaded.append(lora_id)

    locks = {str(number): asyncio.Lock() for number in range(300)}
    models = SimpleNamespace(lora_requests={"static": request(1)}, lora_resolver_lock=locks)
    client = SimpleNamespace(
        output_processor=SimpleNamespace(request_states=states), remove_lora=remove_lora
    )
    engine = VllmEngine(SimpleNamespace(openai_serving_models=models, engine_client=client))
    assert not engine.uses(7)
    states["2"] = SimpleNamespace(lora_request=request(7))
    assert engine.uses(7)
    end = engine.watch(Watcher())
    assert isinstance(models.lora_requests, Watched)
    engine.forget("static")
    end()
    assert models.lora_requests == {}

    async def work() -> None:
        await engine.unload(7)
        async with locks["5"]:
            engine.tidy()

    asyncio.run(work())
    assert unloaded == [7]
    assert list(locks) == ["5"], "a lock that somebody has stays"


@pytest.mark.parametrize(
    ("path", "closed"),
    [
        ("/v1/load_lora_adapter", True),
        ("/v1/unload_lora_adapter/", True),
        ("//v1/load_lora_adapter", True),
        ("/root/v1/load_lora_adapter", True),
        ("/adapters", True),
        ("/adapters/sql", True),
        ("/root/adapters/sql", True),
        ("/v1/completions", False),
        ("/v1/models", False),
        ("/adaptersx", False),
        ("/", False),
    ],
)
def test_routes_that_load_any_directory_are_closed(path: str, closed: bool) -> None:
    """vLLM's and SageMaker's; 404, as where vLLM does not have them."""
    scope = {"type": "http", "path": path, "root_path": "/root"}
    assert is_closed(scope) is closed
    reached: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        reached.append(scope["path"])
        assert REQUEST.get() == []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ServeAdapters(app)(scope, None, send))  # type: ignore[arg-type]
    assert reached == ([] if closed else [path])
    assert [one.get("status") for one in sent] == ([404, None] if closed else [])


def test_a_start_without_adapters_ends_instead_of_serving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """uvicorn would take an exception for an application without a lifespan."""
    monkeypatch.delenv("TENSORSERVE_INTERNAL_HANDOFF", raising=False)
    sent: list[Any] = []

    async def app(*_: Any) -> None:
        raise AssertionError("it must not begin")

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "lifespan", "app": SimpleNamespace(state=SimpleNamespace())}
    asyncio.run(ServeAdapters(app)(scope, receive, send))
    assert [one["type"] for one in sent] == ["lifespan.startup.failed"]


@pytest.mark.parametrize(
    ("messages", "received", "whole"),
    [
        ([{"type": "http.response.start"}, {"type": "http.response.body"}], [], True),
        ([{"type": "http.response.body", "more_body": True}], [], False),
        ([{"type": "http.response.body"}], ["http.disconnect"], False),
        ([{"type": "http.response.body"}], ["http.request"], True),
    ],
    ids=["whole", "cut off", "client left", "with a body"],
)
def test_it_is_told_whether_the_client_had_its_whole_answer(
    monkeypatch: pytest.MonkeyPatch,
    messages: list[dict[str, Any]],
    received: list[str],
    whole: bool,
) -> None:
    """vLLM answers `null` to a client that has left (with_cancellation)."""
    told: list[bool] = []
    store = SimpleNamespace(answered=lambda _, whole: told.append(whole))
    monkeypatch.setattr("tensorserve.engine.adapters.middleware.serving.store", store)

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        for _ in received:
            await receive()
        for message in messages:
            await send(message)
        if whole:
            await receive()  # after the answer: no abort

    left = [*received, "http.disconnect"]

    async def receive() -> Any:
        return {"type": left.pop(0)}

    async def send(_: Any) -> None: ...

    asyncio.run(ServeAdapters(app)({"type": "http", "path": "/v1/completions"}, receive, send))
    assert told == [whole]
