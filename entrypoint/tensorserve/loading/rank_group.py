"""How do the ranks of one machine give tensors to each other? By broadcasts of torch.distributed.

A word goes before each message: its owner has it, or has failed. So no rank begins a broadcast that
its owner has not begun: on a GPU such a broadcast would be a kernel that waits for a network. Words
go over gloo.

A rank that ends may leave a broadcast behind that never ends. NCCL does not notice that a process
has ended. gloo does, but tells nobody who has a part of a message already (Pair::signalException in
gloo/transport/tcp/pair.cc leaves out the receive that is under way). So each rank watches the
others' processes while it waits.

The groups are made here, not by torch.distributed.new_group (torch 2.13). With vLLM's own groups,
broadcasts would have to come in the same order with vLLM's collectives. Of new_group, all of vLLM's
ranks would have to make each group, or groups of the same ranks get the same name, under which the
next load finds the addresses of the last one. And gloo listens on this machine's loopback alone:
what is sent is in clear.

With NCCL: written by torch's documentation, not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tensorserve.errors import OtherRankError, TensorserveError
from tensorserve.loading.tuning import DEFAULTS

_HAS_IT, _FAILED = 1, 0
_LOOPBACK = "127.0.0.1"
# What ends a load that stands still is TENSORSERVE_START_DEADLINE, or the source's own deadline.
_TIMEOUT = timedelta(days=1)
# The parts of torch.distributed that are used have no types.
_DIST: Any = dist


@dataclass(frozen=True, eq=False)
class Word:
    """What a rank says of its next message."""

    value: torch.Tensor
    owner: int
    work: Any

    @property
    def said(self) -> bool:
        """Whether it has come, or never will."""
        done: bool = self.work.is_completed()
        return done


@dataclass(frozen=True, eq=False)
class Broadcast:
    """One that was begun."""

    word: Word
    work: Any


class RankGroup:
    """The ranks that load one file together.

    All ranks make it, call `say` or `hear`, `broadcast` and `gather` in the same order, and close
    it. What another rank's end breaks is raised as OtherRankError.
    """

    def __init__(self, name: str, rank: int, size: int, device: torch.device) -> None:
        """`name`: of this load, the same for all ranks and never used before. They are `size`, in
        torch's default process group, whose store is used to find each other.
        """
        self.rank, self.size = rank, size
        store = _DIST.PrefixStore(name, dist.distributed_c10d._get_default_store())
        processes = _DIST.PrefixStore("processes", store)
        processes.set(str(rank), json.dumps(_this_process()))
        try:
            self._words = _gloo(_DIST.PrefixStore("words", store), rank, size)
            self._data = (
                self._words
                if device.type == "cpu"
                else _nccl(_DIST.PrefixStore("data", store), rank, size)
            )
        except RuntimeError as error:
            raise _refused(error) from error
        # All of them are there: they have found each other.
        others = {other: json.loads(processes.get(str(other))) for other in range(size)}
        self._ends = _Ends(others)

    def say(self) -> Word:
        """Tell the others that this rank has its next message. Does not wait until they hear it."""
        return self._word(_HAS_IT, self.rank)

    def say_failed(self) -> None:
        """Tell them that it never will. Waits a while, since this process may end afterwards."""
        with suppress(RuntimeError, TensorserveError):
            word = self._word(_FAILED, self.rank)
            until = time.monotonic() + DEFAULTS.say_failed_seconds
            while not word.said and time.monotonic() < until:
                time.sleep(DEFAULTS.most_share_poll_seconds)

    def hear(self, owner: int) -> Word:
        """What `owner` will say of its next message."""
        return self._word(_FAILED, owner)

    def heard(self, word: Word) -> None:
        """Wait until the owner has its message. Raises OtherRankError if it has failed."""
        self._wait(word.work)
        if word.value.item() != _HAS_IT:
            raise _other_rank(f"rank {word.owner} of them could not load its part")

    def broadcast(self, memory: torch.Tensor, word: Word) -> Broadcast:
        """Begin to send or receive `memory` (uint8, on the group's device) after its `word`."""
        return Broadcast(word, self._begin(memory, word.owner, self._data))

    def arrived(self, broadcast: Broadcast) -> None:
        """Wait until it is over, here; on a GPU the current stream is told as well."""
        self._wait(broadcast.word.work)
        self._wait(broadcast.work)

    def gather(self, value: object) -> list[Any]:
        """What each rank gives, by rank; what JSON can hold."""
        return [self._given(rank, value) for rank in range(self.size)]

    def close(self, *, failed: bool) -> None:
        """Give the groups up. `failed`: some broadcasts may never end."""
        self._ends.close()
        if self._data is not self._words:
            # Else its kernels might go on, and its memory would be the load's for ever.
            with suppress(RuntimeError):
                self._data.abort() if failed else self._data.shutdown()
        if failed:
            # The end of a gloo group waits for its broadcasts: it has to end with the process.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._words))

    def _given(self, rank: int, value: object) -> Any:
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([own.numel()], dtype=torch.int64, device="cpu")
        self._wait(self._begin(length, rank, self._words))
        text = own if rank == self.rank else _host_bytes(int(length.item()))
        self._wait(self._begin(text, rank, self._words))
        return json.loads(text.numpy().tobytes())

    def _word(self, value: int, owner: int) -> Word:
        # vLLM may have set another device for what torch makes.
        memory = torch.tensor([value], dtype=torch.uint8, device="cpu")
        return Word(memory, owner, self._begin(memory, owner, self._words))

    def _begin(self, memory: torch.Tensor, owner: int, group: Any) -> Any:
        try:
            return group.broadcast(memory, owner)
        except RuntimeError as error:
            raise _refused(error) from error

    def _wait(self, work: Any) -> None:
        # Not in one call of C: a signal's handler would have to wait for it.
        pause = DEFAULTS.least_share_poll_seconds
        ended: int | None = None
        until = 0.0
        while not work.is_completed():
            if ended is None:
                ended = self._ends.first()
                # What it has sent still arrives, and its word or gloo's error says more.
                until = time.monotonic() + DEFAULTS.rank_ended_seconds
            elif time.monotonic() > until:
                raise _other_rank(f"the process of rank {ended} is gone")
            time.sleep(pause)
            pause = min(2 * pause, DEFAULTS.most_share_poll_seconds)
        try:
            work.wait()
        except RuntimeError as error:
            raise _other_rank(str(error)) from error


class _Ends:
    """Which processes have ended, whoever is their parent and whether or not it knows."""

    def __init__(self, processes: dict[int, tuple[int, str]]) -> None:
        """`processes`: those of all ranks, as `_this_process` gives them."""
        self._poll = select.poll()
        self._ranks: dict[int, int] = {}
        self._gone: int | None = None
        own_id, own_namespace = _this_process()
        for rank, (process_id, namespace) in processes.items():
            # A number of another namespace may be any process's here.
            if process_id == own_id or namespace != own_namespace:
                continue
            try:
                descriptor = os.pidfd_open(process_id)
            except ProcessLookupError:
                self._gone = rank
            except OSError:
                # A sandbox that refuses it: TENSORSERVE_START_DEADLINE ends a start that hangs.
                continue
            else:
                self._ranks[descriptor] = rank
                self._poll.register(descriptor, select.POLLIN)

    def first(self) -> int | None:
        """A rank whose process has ended."""
        for descriptor, _ in self._poll.poll(0):
            self._gone = self._ranks[descriptor]
        return self._gone

    def close(self) -> None:
        for descriptor in self._ranks:
            os.close(descriptor)
        self._ranks.clear()
        self._poll = select.poll()


def _this_process() -> tuple[int, str]:
    """Its number, and the namespace in which it is a number."""
    return os.getpid(), str(Path("/proc/self/ns/pid").readlink())


def _gloo(store: Any, rank: int, size: int) -> Any:
    kind = _DIST.ProcessGroupGloo
    options = kind._Options()
    options._devices = [kind.create_device(hostname=_LOOPBACK)]
    options._timeout = _TIMEOUT
    return kind(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    kind = _DIST.ProcessGroupNCCL
    return kind(store, rank, size, kind.Options())


def _host_bytes(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def _refused(error: RuntimeError) -> TensorserveError:
    return TensorserveError(
        f"torch.distributed refused to share the load ({str(error)[:1000]}).",
        hint="TENSORSERVE_SHARE_LOAD=off: each rank opens all of the file itself.",
    )


def _other_rank(what: str) -> OtherRankError:
    # Its own message is to be the first one in the log, and the one that ends the start.
    time.sleep(DEFAULTS.other_rank_seconds)
    return OtherRankError(
        f"The ranks of this engine load one file together, and another one ended ({what[:500]}).",
        hint="That rank's own error says why.",
    )
