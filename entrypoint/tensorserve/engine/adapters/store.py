"""Which adapters are held, for how long, and what is a request for another one answered?

One object in the API server's process; all methods run in its event loop, and what waits for the
store in threads. A name is looked for once however many ask for it; what was refused stays refused
for some seconds. An adapter's memory is freed when no request can use it any more: vLLM may read it
again between any two steps, and would end if it were gone.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from tensorserve.engine.adapters.counts import AdapterCounts
from tensorserve.engine.adapters.entry import (
    CHANGED,
    EVICTED,
    REMOVED,
    REQUEST,
    UNLOADED,
    UNUSED,
    Entry,
    Limits,
)
from tensorserve.engine.adapters.interfaces import Engine, Store
from tensorserve.engine.adapters.refusal import (
    ENGINE,
    FULL,
    INTERNAL,
    TOO_LARGE,
    UNAVAILABLE,
    UNKNOWN,
    UNUSABLE,
    AdapterRefused,
    check_name,
)
from tensorserve.engine.adapters.refused_names import RefusedNames
from tensorserve.engine.adapters.source import Held
from tensorserve.engine.adapters.threads import in_thread
from tensorserve.errors import CorruptError, SignatureError
from tensorserve.launch.adapter_store import Found

Result = TypeVar("Result")

# Adapters that are fetched at the same time; each takes its size twice more meanwhile.
_MOST_FETCHES = 4
# How often vLLM is given an adapter that it does not take, before it is refused.
_MOST_TRIES = 3
# Until a request that goes on after its answer (the Responses API in the background) has reached
# the engine; and until one that was aborted has left it.
_GRACE_SECONDS, _ABORT_SECONDS = 0.5, 5.0
_REPLACING_SECONDS = 1.0
# How long a load waits for room, and how often it looks.
_PATIENCE, _SECONDS_BETWEEN_LOOKS = 10.0, 0.1
# After a look at the store that failed.
_RETRY_SECONDS = 10.0


class AdapterStore:
    """Adapters of one model."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        limits: Limits,
        counts: AdapterCounts,
        clock: Callable[[], float] = time.monotonic,
        patience: float = _PATIENCE,
        replacing: float = _REPLACING_SECONDS,
    ) -> None:
        """`patience`: seconds that a load waits for room; `replacing`: until a damaged adapter is
        fetched again."""
        self._store = store
        self._engine = engine
        self._limits = limits
        self._counts = counts
        self._clock = clock
        self._patience, self._replacing = patience, replacing
        self._entries: dict[str, Entry] = {}
        self._ending: list[Entry] = []
        """No new request finds them; those that run still use them."""
        self._loading: dict[str, asyncio.Task[Entry]] = {}
        self._reserved: dict[str, int] = {}
        """Bytes of those that are being fetched."""
        self._refused = RefusedNames()
        self._told_away = -math.inf
        """When the log was told that the store is away."""
        self._fetches = asyncio.Semaphore(_MOST_FETCHES)
        self._tasks: set[asyncio.Task[None]] = set()

    # What vLLM asks and tells ------------------------------------------------------------------

    async def resolve(self, name: str) -> Held:
        """The adapter `name`, for vLLM to load. Raises AdapterRefused."""
        asked_at = self._clock()
        try:
            check_name(name, self._limits.allowed)
            self._refused.check(name, asked_at)
            entry = self._entries.get(name)
            if entry is None:
                entry = await self._loaded(name)
            self._give(entry, asked_at)
        except AdapterRefused as refused:
            self._counts.failures[refused.reason] += 1
            raise
        return entry.held

    def loaded(self, name: str, directory: str, lora_id: int) -> None:
        """vLLM has loaded the adapter that was given to it in `directory`."""
        held = (*self._entries.values(), *self._ending)
        entry = next((one for one in held if str(one.held.directory) == directory), None)
        if entry is None:
            return  # it is not one of ours
        entry.lora_id, entry.tries = lora_id, 0
        if entry in self._ending:
            self._engine.forget(name)
            return
        self._counts.loads += 1
        self._counts.load_seconds += self._clock() - entry.asked_at
        self._use(entry, hit=False)

    def used(self, name: str, lora_id: int) -> None:
        """A request has taken the adapter with this id."""
        entry = self._entries.get(name)
        if entry is not None and entry.lora_id == lora_id:
            self._use(entry, hit=True)

    def touched(self, name: str) -> None:
        """A request has asked whether vLLM has the adapter, and is about to take it."""
        if (entry := self._entries.get(name)) is not None:
            self._use(entry, hit=True)

    def answered(self, entries: list[Entry], *, whole: bool) -> None:
        """A request that has used `entries` is over. `whole`: not aborted by its client."""
        for entry in entries:
            entry.requests -= 1
            self._mark(entry, _GRACE_SECONDS if whole else _ABORT_SECONDS)

    def unloaded(self, name: str) -> None:
        """vLLM has been told to forget it by somebody else."""
        if (entry := self._entries.get(name)) is not None and entry.lora_id is not None:
            self._end(entry, UNLOADED)

    # Time ---------------------------------------------------------------------------------------

    def look(self) -> None:
        """What is due now: adapters to be compared with the store, memory to be freed, counts."""
        now = self._clock()
        for entry in list(self._entries.values()):
            if now < entry.due_at or entry.checking:
                continue
            unused = entry.lora_id is None or entry.used_at < entry.looked_at
            if unused and not entry.requests:
                self._end(entry, UNUSED)
            else:
                entry.checking = True
                self._start(self._check(entry))
        for entry in list(self._ending):
            if not self._busy(entry, now):
                self._free(entry)
        self._refused.forget(now)
        sizes = [entry.held.size for entry in (*self._entries.values(), *self._ending)]
        self._engine.tidy()
        self._counts.tell(now, len(sizes), sum(sizes))

    async def settle(self) -> None:
        """Wait for what `look` and `resolve` have begun."""
        while pending := {*self._tasks, *self._loading.values()}:
            await asyncio.wait(pending)

    def close(self) -> None:
        """Free everything. vLLM serves no longer."""
        for task in (*self._tasks, *self._loading.values()):
            task.cancel()
        for entry in (*self._entries.values(), *self._ending):
            entry.held.release()
        self._entries.clear()
        self._ending.clear()

    # Loading ------------------------------------------------------------------------------------

    async def _loaded(self, name: str) -> Entry:
        task = self._loading.get(name)
        if task is None:
            task = asyncio.create_task(self._load(name))
            self._loading[name] = task
            task.add_done_callback(lambda done: self._arrived(name, done))
        # The client may go away; the adapter is for the next one then.
        return await asyncio.shield(task)

    def _arrived(self, name: str, task: asyncio.Task[Entry]) -> None:
        self._loading.pop(name, None)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, AdapterRefused):
            self._refused.add(name, error, self._clock())
            self._tell(name, error)

    def _tell(self, name: str, refused: AdapterRefused) -> None:
        """The log, but not of each name while the store is away: there is no end of names."""
        if refused.status == UNKNOWN:
            return
        if refused.status == UNAVAILABLE:
            now = self._clock()
            if now - self._told_away < _RETRY_SECONDS:
                return
            self._told_away = now
        _say(f"adapter {name} is not served: {refused.message}")

    async def _load(self, name: str) -> Entry:
        try:
            return await self._load_once(name)
        except AdapterRefused as refused:
            if refused.reason not in {CorruptError.reason, SignatureError.reason}:
                raise
        # Perhaps somebody is replacing it: its weights are there before its manifest.
        await asyncio.sleep(self._replacing)
        return await self._load_once(name)

    async def _load_once(self, name: str) -> Entry:
        async with self._fetches:
            began = self._clock()
            found = await self._wait(lambda: self._store.find(name))
        await self._earlier_one_gone(name)
        await self._room_for(found)
        try:
            async with self._fetches:
                held = await self._wait(lambda: self._store.hold(found))
        finally:
            del self._reserved[name]
        self._entries[name] = entry = Entry(
            held, began, began + self._limits.ttl, used_at=self._clock()
        )
        return entry

    async def _wait(self, call: Callable[[], Result]) -> Result:
        """`call` in a thread. Raises AdapterRefused and nothing else."""
        try:
            return await in_thread(call)
        except AdapterRefused:
            raise
        # Of one adapter: the server goes on.
        except Exception as error:
            said = "It could not be loaded."
            message = f"internal error: {error!r}"
            raise AdapterRefused(INTERNAL, UNAVAILABLE, message, said) from error

    def _give(self, entry: Entry, asked_at: float) -> None:
        """To vLLM, which holds a lock for the name: where it was given before and is not loaded,
        vLLM could not load it, or its client has gone away."""
        if entry.tries >= _MOST_TRIES:
            refused = AdapterRefused(
                ENGINE,
                UNUSABLE,
                f"vLLM could not load adapter {entry.held.name}; its message is above",
                "It was found but could not be loaded.",
            )
            self._end(entry, UNLOADED)
            self._refused.add(entry.held.name, refused, self._clock())
            raise refused
        if entry.requests == 0:
            entry.tries += 1
        entry.asked_at = asked_at
        self._use(entry, hit=False)

    async def _earlier_one_gone(self, name: str) -> None:
        """Wait until no request uses an earlier version of `name`. Raises AdapterRefused.

        vLLM's workers compare adapters by name alone (lora/request.py, `__eq__`, 0.32.0): of two
        with one name in a batch they make one active, and end at the other one.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        while earlier := [one for one in self._ending if one.held.name == name]:
            now = self._clock()
            for entry in earlier:
                if not self._busy(entry, now):
                    self._free(entry)
            if not any(one in self._ending for one in earlier):
                return
            if loop.time() >= deadline:
                raise AdapterRefused(
                    FULL,
                    UNAVAILABLE,
                    f"adapter {name} was changed, and requests still use the earlier one",
                    "Requests still use an earlier version of it. Try again later.",
                )
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    async def _room_for(self, found: Found) -> None:
        """Reserve room; ends others that nobody uses, and waits for one. Raises AdapterRefused."""
        limits, loop = self._limits, asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        if found.size > limits.memory:
            raise AdapterRefused(
                TOO_LARGE,
                UNUSABLE,
                f"adapter {found.name} has {found.size} bytes, TENSORSERVE_ADAPTERS_MEMORY is "
                f"{limits.memory}",
                "It was found but could not be loaded: it is too large.",
            )
        while self._is_full(found.size):
            now = self._clock()
            idle = [entry for entry in self._entries.values() if not self._busy(entry, now)]
            if idle:
                entry = min(idle, key=lambda one: one.used_at)
                self._end(entry, EVICTED)
                self._free(entry)
            elif loop.time() < deadline:
                await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
            else:
                raise AdapterRefused(
                    FULL,
                    UNAVAILABLE,
                    f"there is no room for adapter {found.name} while all others are in use "
                    "(TENSORSERVE_ADAPTERS_COUNT, TENSORSERVE_ADAPTERS_MEMORY)",
                    "There is no room for another adapter now. Try again later.",
                )
        self._reserved[found.name] = found.size

    def _is_full(self, more: int) -> bool:
        held = (*self._entries.values(), *self._ending)
        taken = sum(entry.held.size for entry in held) + sum(self._reserved.values())
        count = len(self._entries) + len(self._reserved)
        return taken + more > self._limits.memory or count >= self._limits.count

    # Ending -------------------------------------------------------------------------------------

    async def _check(self, entry: Entry) -> None:
        """Is the adapter still there, and the same?"""
        name, began = entry.held.name, self._clock()
        try:
            found = await self._wait(lambda: self._store.find(name))
        except AdapterRefused as refused:
            if refused.status == UNAVAILABLE:
                # It was not taken away. The store is asked again soon.
                self._counts.failures[refused.reason] += 1
                entry.due_at = self._clock() + min(_RETRY_SECONDS, self._limits.ttl)
            elif refused.status == UNKNOWN:
                self._end(entry, REMOVED)
            else:
                self._counts.failures[refused.reason] += 1
                _say(f"adapter {name} was changed, and is served no longer: {refused.message}")
                self._end(entry, CHANGED)
        else:
            if found.version == entry.held.version:
                entry.looked_at, entry.due_at = began, began + self._limits.ttl
            else:
                self._end(entry, CHANGED)
        finally:
            entry.checking = False

    def _end(self, entry: Entry, why: str) -> None:
        """New requests for its name are new."""
        if self._entries.get(entry.held.name) is not entry:
            return
        del self._entries[entry.held.name]
        self._ending.append(entry)
        self._counts.ended[why] += 1
        if entry.lora_id is not None:
            self._engine.forget(entry.held.name)

    def _free(self, entry: Entry) -> None:
        self._ending.remove(entry)
        entry.held.release()
        if entry.lora_id is not None:
            self._start(self._engine.unload(entry.lora_id))

    def _busy(self, entry: Entry, now: float) -> bool:
        if entry.requests or now < entry.in_use_until:
            return True
        return entry.lora_id is not None and self._engine.uses(entry.lora_id)

    # Else ---------------------------------------------------------------------------------------

    def _use(self, entry: Entry, *, hit: bool) -> None:
        self._mark(entry, _GRACE_SECONDS)
        users = REQUEST.get()
        if users is None or entry in users:
            return
        users.append(entry)
        entry.requests += 1
        self._counts.hits += hit

    def _mark(self, entry: Entry, seconds: float) -> None:
        entry.used_at = self._clock()
        entry.in_use_until = max(entry.in_use_until, entry.used_at + seconds)

    def _start(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _say(f"an adapter's memory in the engine could not be freed: {error!r}")


def _say(text: str) -> None:
    print(f"tensorserve: warning: {text}", file=sys.stderr, flush=True)
