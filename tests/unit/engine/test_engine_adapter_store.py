"""Which adapters are held, for how long, and what is asked of the store and of the engine?

The store's clock is the test's; what vLLM does with the answers is done here by hand.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from tensorserve.bundle.adapter_identity import AdapterIdentity
from tensorserve.bundle.manifest import Manifest, TensorsEntry
from tensorserve.engine.adapters.counts import AdapterCounts
from tensorserve.engine.adapters.entry import REQUEST, Entry, Limits
from tensorserve.engine.adapters.refusal import AdapterRefused, refused
from tensorserve.engine.adapters.refused_names import REFUSED_SECONDS
from tensorserve.engine.adapters.source import Held
from tensorserve.engine.adapters.store import AdapterStore
from tensorserve.errors import (
    CorruptError,
    SignatureError,
    SourceUnavailableError,
    TensorserveError,
)
from tensorserve.launch.adapter_store import Found
from tensorserve.sources import NotFoundError
from tensorserve.telemetry.schema import AdaptersCounted, Event

TTL = 100.0
LIMITS = Limits(allowed=(), ttl=TTL, count=3, memory=1000)


class Shelf:
    """A store: {name: (version, size)}, errors by name, and a gate for each name that waits."""

    def __init__(self, tmp_path: Path, **adapters: tuple[str, int]) -> None:
        self.adapters = adapters
        self.errors: dict[str, TensorserveError] = {}
        self.gates: dict[str, threading.Event] = {}
        self.asked: Counter[str] = Counter()
        self.held: list[Released] = []
        self.damaged: list[TensorserveError] = []
        """What the next fetches of weights end with."""
        self._tmp_path = tmp_path

    def find(self, name: str) -> Found:
        self.asked[name] += 1
        if name in self.gates:
            assert self.gates[name].wait(60)
        if name in self.errors:
            raise refused(self.errors[name])
        if name not in self.adapters:
            raise refused(NotFoundError("not there"))
        version, size = self.adapters[name]
        entry = TensorsEntry(size, 1, size, "", "")
        manifest = Manifest((), {}, None, sha256=version, adapter=AdapterIdentity(name))
        return Found(name, manifest, entry)

    def hold(self, found: Found) -> Held:
        if self.damaged:
            raise refused(self.damaged.pop())
        directory = self._tmp_path / f"{len(self.held)}-{found.name}"
        held = Released(found.name, found.version, found.size, directory, "")
        self.held.append(held)
        return held


class Released(Held):
    """Tells whether its memory was freed."""

    freed: list[str] = []  # noqa: RUF012 - set for each test

    def release(self) -> None:
        assert self.directory.name not in self.freed, "freed twice"
        self.freed.append(self.directory.name)


class Vllm:
    """What a store tells vLLM."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.unloaded: list[int] = []
        self.running: set[int] = set()

    def forget(self, name: str) -> None:
        self.forgotten.append(name)

    def tidy(self) -> None: ...

    def uses(self, lora_id: int) -> bool:
        return lora_id in self.running

    async def unload(self, lora_id: int) -> None:
        self.unloaded.append(lora_id)


class World:
    """A store of adapters over a Shelf, and its clock."""

    def __init__(self, shelf: Shelf, limits: Limits = LIMITS) -> None:
        self.shelf, self.vllm, self.now = shelf, Vllm(), 1000.0
        self.events: list[Event] = []
        self.counts = AdapterCounts(self.events.append)
        self.store = AdapterStore(
            shelf, self.vllm, limits, self.counts, lambda: self.now, patience=0.0, replacing=0.0
        )
        self._ids = 0

    async def load(self, name: str) -> int:
        """As vLLM does for the first request; gives the adapter's id."""
        held = await self.store.resolve(name)
        self._ids += 1
        self.store.loaded(name, str(held.directory), self._ids)
        return self._ids

    async def pass_time(self, seconds: float) -> None:
        """And have the store look."""
        self.now += seconds
        self.store.look()
        await self.store.settle()


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Three adapters of 400 bytes."""
    Released.freed = []
    return Shelf(tmp_path, a=("a1", 400), b=("b1", 400), c=("c1", 400))


def run(work: Coroutine[Any, Any, None]) -> None:
    """To its end, with a deadline that only a fault reaches."""
    asyncio.run(asyncio.wait_for(work, 60))


async def refusal(world: World, name: str) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        await world.store.resolve(name)
    return caught.value


def test_a_name_is_looked_for_once_however_many_ask(shelf: Shelf) -> None:
    """All get the same one."""
    shelf.gates["a"] = threading.Event()

    async def work() -> None:
        world = World(shelf)

        async def ask() -> Held:
            REQUEST.set([])
            return await world.store.resolve("a")

        asking = [asyncio.create_task(ask()) for _ in range(20)]
        await asyncio.sleep(0)
        shelf.gates["a"].set()
        assert len({held.directory for held in await asyncio.gather(*asking)}) == 1
        assert shelf.asked["a"] == 1

    run(work())


def test_the_loop_goes_on_while_the_store_is_silent(shelf: Shelf) -> None:
    """Another adapter is loaded meanwhile."""
    shelf.gates["a"] = threading.Event()

    async def work() -> None:
        world = World(shelf)
        slow = asyncio.create_task(world.store.resolve("a"))
        await world.load("b")
        assert not slow.done()
        shelf.gates["a"].set()
        assert (await slow).name == "a"

    run(work())


def test_a_client_that_leaves_does_not_end_the_load(shelf: Shelf) -> None:
    """What it asked for is there for the next one, and the store is not asked again."""
    shelf.gates["a"] = threading.Event()

    async def work() -> None:
        world = World(shelf)
        leaving = asyncio.create_task(world.store.resolve("a"))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        shelf.gates["a"].set()
        await world.store.settle()
        assert (await world.store.resolve("a")).name == "a"
        assert shelf.asked["a"] == 1

    run(work())


def test_a_name_that_does_not_exist_is_not_asked_for_again(shelf: Shelf) -> None:
    """For ten seconds; what was uploaded is found then."""

    async def work() -> None:
        world = World(shelf)
        for _ in range(5):
            assert (await refusal(world, "new")).status == 404
        assert shelf.asked["new"] == 1
        assert world.counts.failures == {"not_found": 5}
        shelf.adapters["new"] = ("n1", 1)
        world.now += REFUSED_SECONDS
        assert (await world.store.resolve("new")).name == "new"

    run(work())


NAMES = ["", ".", "..", "../a", "/a", "a/b", "a%2fb", "%2e%2e", "a\0", "a\n", "a b", "é", "a" * 129]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leaves_the_store_is_never_asked_for(shelf: Shelf, name: str) -> None:
    """Nor is it remembered: there is no end of such names."""

    async def work() -> None:
        world = World(shelf)
        found = await refusal(world, name)
        assert (found.status, found.reason) == (404, "name")
        assert not shelf.asked

    run(work())


def test_only_allowed_names_are_asked_for(shelf: Shelf) -> None:
    """`*` stands for any characters."""

    async def work() -> None:
        world = World(shelf, Limits(("a", "team-*"), TTL, 3, 1000))
        await world.load("a")
        assert (await refusal(world, "b")).reason == "not_allowed"
        assert (await refusal(world, "team-x")).reason == "not_found"
        assert set(shelf.asked) == {"a", "team-x"}

    run(work())


def test_one_that_nobody_uses_is_let_go(shelf: Shelf) -> None:
    """After the time to live; the store is not asked."""

    async def work() -> None:
        world = World(shelf)
        lora_id = await world.load("a")
        await world.pass_time(TTL)  # used since it was loaded
        assert shelf.asked["a"] == 2
        await world.pass_time(TTL)
        assert shelf.asked["a"] == 2
        assert world.vllm.forgotten == ["a"]
        await world.pass_time(6)
        assert world.vllm.unloaded == [lora_id]
        assert Released.freed == ["0-a"]
        assert world.counts.ended == {"unused": 1}

    run(work())


def test_one_that_was_removed_ends_at_the_next_look(shelf: Shelf) -> None:
    """A new request finds nothing."""

    async def work() -> None:
        world = World(shelf)
        lora_id = await world.load("a")
        del shelf.adapters["a"]
        await world.pass_time(TTL - 1)
        assert world.vllm.forgotten == []
        world.store.used("a", lora_id)
        await world.pass_time(1)
        assert world.vllm.forgotten == ["a"]
        assert (await refusal(world, "a")).status == 404
        assert world.counts.ended == {"removed": 1}

    run(work())


def test_a_changed_one_is_loaded_anew_elsewhere(shelf: Shelf) -> None:
    """vLLM's prefix cache must not take one for the other: the directory is another one."""

    async def work() -> None:
        world = World(shelf)
        first = await world.store.resolve("a")
        world.store.loaded("a", str(first.directory), 1)
        shelf.adapters["a"] = ("a2", 400)
        await world.pass_time(TTL)
        second = await world.store.resolve("a")
        assert (second.version, first.version) == ("a2", "a1")
        assert second.directory != first.directory
        assert world.counts.ended == {"changed": 1}

    run(work())


def test_one_that_is_no_longer_authentic_ends(shelf: Shelf) -> None:
    """It is not served any longer because it once was."""

    async def work() -> None:
        world = World(shelf)
        await world.load("a")
        shelf.errors["a"] = CorruptError("forged")
        await world.pass_time(TTL)
        assert world.vllm.forgotten == ["a"]
        assert world.counts.failures == {"corrupt": 1}

    run(work())


def test_a_store_that_is_away_ends_nothing(shelf: Shelf) -> None:
    """It is asked again soon, and an adapter that was removed meanwhile ends then."""

    async def work() -> None:
        world = World(shelf)
        lora_id = await world.load("a")
        shelf.errors["a"] = SourceUnavailableError("away")
        await world.pass_time(TTL)
        assert world.vllm.forgotten == []
        assert world.counts.failures == {"source_unavailable": 1}
        world.store.used("a", lora_id)
        shelf.errors["a"] = NotFoundError("removed")
        await world.pass_time(10)
        assert world.vllm.forgotten == ["a"]

    run(work())


def test_a_new_name_while_the_store_is_away_is_told_so(shelf: Shelf) -> None:
    """Not that it does not exist."""
    shelf.errors["a"] = SourceUnavailableError("away: s3://secret-bucket")

    async def work() -> None:
        found = await refusal(World(shelf), "a")
        assert found.status == 503
        assert "bucket" not in found.said

    run(work())


def test_the_log_is_told_once_that_the_store_is_away(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever asks for how many names; an adapter that is damaged is named each time."""

    async def work() -> None:
        world = World(shelf)
        for number in range(50):
            shelf.errors[f"away-{number}"] = SourceUnavailableError("no answer")
            await refusal(world, f"away-{number}")
        for number in range(3):
            shelf.errors[f"bad-{number}"] = CorruptError("damaged", hint="Pack it again.")
            await refusal(world, f"bad-{number}")

    run(work())
    said = capsys.readouterr().err
    assert said.count("no answer") == 1
    assert said.count("is not served: damaged Pack it again.") == 3


def test_of_too_many_the_one_used_longest_ago_gives_way(shelf: Shelf) -> None:
    """By count, and by bytes: two of 400 fit into 1000."""

    async def work() -> None:
        world = World(shelf)
        first, second = await world.load("a"), await world.load("b")
        world.now += 10
        world.store.used("a", first)
        world.now += 10
        await world.load("c")
        assert world.vllm.forgotten == ["b"]
        assert Released.freed == ["1-b"]
        await world.store.settle()
        assert world.vllm.unloaded == [second]
        assert world.counts.ended == {"evicted": 1}

    run(work())


@pytest.mark.parametrize("how", ["just used", "answering", "in the engine"])
def test_one_that_is_in_use_is_not_freed(shelf: Shelf, how: str) -> None:
    """vLLM would end when it looks for it; who asks for another one is told to come again."""

    async def work() -> None:
        world = World(shelf, Limits((), TTL, 1, 1000))
        users: list[Entry] = []
        REQUEST.set(users if how == "answering" else None)
        lora_id = await world.load("a")
        if how == "in the engine":
            world.vllm.running.add(lora_id)
        world.now += 0 if how == "just used" else 10
        found = await refusal(world, "b")
        assert (found.status, found.reason) == (503, "full")
        assert Released.freed == []
        world.vllm.running.clear()
        world.store.answered(users, whole=True)
        world.now += REFUSED_SECONDS
        assert (await world.store.resolve("b")).name == "b"
        assert Released.freed == ["0-a"]

    run(work())


@pytest.mark.parametrize(("whole", "kept"), [(True, False), (False, True)])
def test_one_whose_request_was_aborted_stays_for_a_while(
    shelf: Shelf, whole: bool, kept: bool
) -> None:
    """The engine hears of it a moment later, and may have begun to read the adapter."""

    async def work() -> None:
        world = World(shelf)
        users: list[Entry] = []
        REQUEST.set(users)
        await world.load("a")
        world.store.unloaded("a")
        world.store.answered(users, whole=whole)
        await world.pass_time(1)
        assert (Released.freed == []) is kept
        await world.pass_time(5)
        assert Released.freed == ["0-a"]

    run(work())


def test_a_new_version_waits_for_the_requests_of_the_old_one(shelf: Shelf) -> None:
    """vLLM ends where two of one name are in a batch."""

    async def work() -> None:
        world = World(shelf)
        lora_id = await world.load("a")
        world.vllm.running.add(lora_id)
        shelf.adapters["a"] = ("a2", 400)
        await world.pass_time(TTL)
        assert world.vllm.forgotten == ["a"]
        found = await refusal(world, "a")
        assert (found.status, "earlier version" in found.said) == (503, True)
        assert len(shelf.held) == 1
        world.vllm.running.clear()
        world.now += REFUSED_SECONDS
        assert (await world.store.resolve("a")).version == "a2"
        assert Released.freed == ["0-a"]

    run(work())


@pytest.mark.parametrize("error", [CorruptError, SignatureError])
def test_one_that_is_being_replaced_is_fetched_again(
    shelf: Shelf, error: type[TensorserveError]
) -> None:
    """Its weights are there before its manifest. One that stays damaged is refused."""

    async def work() -> None:
        world = World(shelf)
        shelf.damaged = [error("not as in the manifest")]
        assert (await world.store.resolve("a")).name == "a"
        assert shelf.asked["a"] == 2
        shelf.damaged = [error("damaged")] * 2
        assert (await refusal(world, "b")).reason == error.reason

    run(work())


def test_a_load_waits_until_there_is_room(shelf: Shelf) -> None:
    """A request that ends makes some; meanwhile other loads go on."""

    async def work() -> None:
        world = World(shelf, Limits((), TTL, 1, 1000))
        world.store = AdapterStore(
            shelf, world.vllm, Limits((), TTL, 1, 1000), world.counts, lambda: world.now
        )
        world.vllm.running.add(await world.load("a"))
        world.now += 10
        waiting = asyncio.create_task(world.store.resolve("b"))
        while not shelf.asked["b"]:
            await asyncio.sleep(0.01)
        assert (await refusal(world, "new")).reason == "not_found"
        assert not waiting.done()
        world.vllm.running.clear()
        assert (await waiting).name == "b"
        assert Released.freed == ["0-a"]

    run(work())


def test_one_that_has_ended_is_freed_after_its_last_answer(shelf: Shelf) -> None:
    """New requests do not find it; those that run still use its memory, which counts."""

    async def work() -> None:
        world = World(shelf)
        lora_id = await world.load("a")
        world.vllm.running.add(lora_id)
        del shelf.adapters["a"]
        await world.pass_time(TTL)
        assert world.vllm.forgotten == ["a"]
        await world.pass_time(1000)
        assert Released.freed == []
        assert world.vllm.unloaded == []
        world.vllm.running.clear()
        await world.pass_time(1)
        assert Released.freed == ["0-a"]
        assert world.vllm.unloaded == [lora_id]

    run(work())


def test_one_that_is_larger_than_the_memory_is_not_fetched(shelf: Shelf) -> None:
    """Its manifest says so."""
    shelf.adapters["huge"] = ("h", 1001)

    async def work() -> None:
        found = await refusal(World(shelf), "huge")
        assert (found.status, found.reason) == (400, "too_large")
        assert shelf.held == []

    run(work())


def test_what_is_being_fetched_counts_too(shelf: Shelf) -> None:
    """Four at once must not take four times the memory."""
    for name in "abc":
        shelf.gates[name] = threading.Event()

    async def work() -> None:
        world = World(shelf)
        asking = [asyncio.create_task(world.store.resolve(name)) for name in "abc"]
        await asyncio.sleep(0)
        for gate in shelf.gates.values():
            gate.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        kinds = Counter(type(answer).__name__ for answer in answers)
        assert kinds == {"Released": 2, "AdapterRefused": 1}

    run(work())


def test_one_that_vllm_cannot_load_is_not_given_for_ever(shelf: Shelf) -> None:
    """Each try stops the engine for a moment."""

    async def work() -> None:
        world = World(shelf)
        for _ in range(3):
            await world.store.resolve("a")
        found = await refusal(world, "a")
        assert (found.status, found.reason) == (400, "engine")
        assert shelf.asked["a"] == 1

    run(work())


def test_one_that_vllm_never_took_is_let_go(shelf: Shelf) -> None:
    """Its client has left, say."""

    async def work() -> None:
        world = World(shelf)
        await world.store.resolve("a")
        await world.pass_time(TTL)
        await world.pass_time(6)
        assert Released.freed == ["0-a"]
        assert world.vllm.unloaded == []

    run(work())


def test_one_that_ends_while_vllm_loads_it_does_not_stay(shelf: Shelf) -> None:
    """vLLM would have it for ever, and its memory would be freed under it."""

    async def work() -> None:
        world = World(shelf)
        users: list[Entry] = []
        REQUEST.set(users)
        held = await world.store.resolve("a")
        shelf.adapters["a"] = ("a2", 400)
        await world.pass_time(TTL)
        await world.pass_time(100)
        assert Released.freed == [], "vLLM still reads it"
        world.store.loaded("a", str(held.directory), 7)
        assert world.vllm.forgotten == ["a"]
        world.store.answered(users, whole=True)
        await world.pass_time(6)
        assert Released.freed == ["0-a"]
        assert world.vllm.unloaded == [7]
        assert (await world.store.resolve("a")).version == "a2"

    run(work())


def test_a_hit_counts_once_a_request_and_a_load_is_none(shelf: Shelf) -> None:
    """vLLM looks into its dict several times for each."""

    async def work() -> None:
        world = World(shelf)
        REQUEST.set([])
        lora_id = await world.load("a")
        world.store.used("a", lora_id)
        assert (world.counts.loads, world.counts.hits) == (1, 0)
        REQUEST.set([])
        for _ in range(3):
            world.store.used("a", lora_id)
        assert (world.counts.loads, world.counts.hits) == (1, 1)

    run(work())


def test_a_fault_of_our_own_refuses_one_adapter(shelf: Shelf) -> None:
    """And is an answer, not an exception in vLLM."""
    shelf.adapters["a"] = None  # type: ignore[assignment]

    async def work() -> None:
        found = await refusal(World(shelf), "a")
        assert (found.status, found.reason) == (503, "internal")

    run(work())


def test_counts_are_told_at_once_and_then_seldom(shelf: Shelf) -> None:
    """The log has no end: hits alone are worth a line a minute."""

    async def work() -> None:
        world = World(shelf)
        REQUEST.set([])
        lora_id = await world.load("a")
        await world.pass_time(0)
        for _ in range(50):
            REQUEST.set([])
            world.store.used("a", lora_id)
            await world.pass_time(1)
        assert len(world.events) == 1
        await world.pass_time(10)
        first, second = world.events
        assert isinstance(first, AdaptersCounted)
        assert (first.loads, first.hits, first.held, first.held_bytes) == (1, 0, 1, 400)
        assert isinstance(second, AdaptersCounted)
        assert second.hits == 50

    run(work())


def test_the_end_frees_everything(shelf: Shelf) -> None:
    """Also what is not in vLLM yet."""

    async def work() -> None:
        world = World(shelf)
        await world.load("a")
        await world.store.resolve("b")
        world.store.close()
        assert sorted(Released.freed) == ["0-a", "1-b"]

    run(work())
