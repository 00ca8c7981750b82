"""How do the ranks of a machine load one file together? Each opens a part and gives it to the rest.

Each rank reads its own part with a TensorStream. The consumer's thread takes what is complete
there, begins the broadcasts of it, and receives what others send, some messages ahead of the
consumer. All ranks begin all broadcasts in file order, whatever the timing. What a message waits
for (its owner's opening, the room in a rank's window) never depends on a later message, so that no
rank waits for ever for one that works.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from tensorserve.errors import CorruptError, OtherRankError
from tensorserve.format import TensorRecord
from tensorserve.loading.header_check import check_headers
from tensorserve.loading.rank_group import Broadcast, RankGroup, Word
from tensorserve.loading.shares import Message
from tensorserve.loading.stream import LoadOptions, TensorStream, shaped
from tensorserve.sources import Source


@dataclass(eq=False)
class _OnItsWay:
    """A message that was begun; without a broadcast where this rank alone needs it."""

    tensors: list[tuple[TensorRecord, torch.Tensor]]
    length: int
    broadcast: Broadcast | None


class SharedStream:
    """Iterate over it as over a TensorStream: what this rank loads, in file order.

    Errors of the own part are raised as they are, and the other ranks are told; theirs are raised
    as OtherRankError. Before the last tensor is handed out, the headers that all ranks have read
    are compared with the manifest's digest, or each rank's with a second read, as in TensorStream.
    """

    def __init__(
        self,
        own: TensorStream,
        messages: Sequence[Message],
        group: RankGroup,
        source: Source,
        options: LoadOptions,
        *,
        window: int,
        memory: Callable[[int], torch.Tensor],
    ) -> None:
        """`own`: of the records that `own_records` gives (shares.py), with `check_whole` off.
        `messages`: those that this rank takes part in, in file order. `window`: bytes that may be
        on their way or wait for the consumer; one message is let in alone. `memory`: gives a uint8
        tensor of a length, on the group's device. `options.headers_sha256` is compared.
        """
        self._own = own
        self._todo = deque(messages)
        self._group = group
        self._source = source
        self._options = options
        self._window = window
        self._memory = memory
        self._begun: deque[_OnItsWay] = deque()
        self._taken = 0
        """Bytes of the window."""
        self._collected: list[tuple[TensorRecord, torch.Tensor]] = []
        """Own tensors of the first message of `_todo`."""
        self._word: Word | None = None
        """Of the owner of that message."""

    def __enter__(self) -> SharedStream:
        self._own.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._own.__exit__(kind, error, trace)
        self._begun.clear()

    def __iter__(self) -> Iterator[tuple[TensorRecord, torch.Tensor]]:
        while self._todo or self._begun:
            self._begin_what_fits()
            message = self._begun.popleft()
            if message.broadcast is not None:
                # Of a message of this rank's as well: the consumer may write to a tensor.
                self._group.arrived(message.broadcast)
            message.broadcast = None
            if not self._todo and not self._begun:
                last = message.tensors.pop()
                yield from self._handed_over(message)
                self._check_headers()
                message.tensors.append(last)
            yield from self._handed_over(message)
            self._taken -= message.length

    @staticmethod
    def _handed_over(message: _OnItsWay) -> Iterator[tuple[TensorRecord, torch.Tensor]]:
        """Its tensors, of which nothing is kept."""
        message.tensors.reverse()
        while message.tensors:
            yield message.tensors.pop()

    # Messages -------------------------------------------------------------------------------------

    def _begin_what_fits(self) -> None:
        """Begin messages as long as there is room and nothing to wait for, but one at least."""
        while self._todo:
            length = self._todo[0].length
            if self._begun and self._taken + length > self._window:
                return
            begun = self._begin(self._todo[0], wait=not self._begun)
            if begun is None:
                return
            self._todo.popleft()
            self._collected, self._word = [], None
            self._begun.append(begun)
            self._taken += length

    def _begin(self, message: Message, *, wait: bool) -> _OnItsWay | None:
        """None where it would have to wait, and must not."""
        if message.owner is None or message.owner == self._group.rank:
            return self._send(message, wait=wait)
        return self._receive(message, message.owner, wait=wait)

    def _send(self, message: Message, *, wait: bool) -> _OnItsWay | None:
        try:
            while len(self._collected) < len(message.records):
                if not wait and not self._own.ready:
                    return None
                taken = self._own.take()
                assert taken is not None
                self._collected.append(taken)
        except BaseException:
            if message.owner is not None:
                self._group.say_failed()
            raise
        tensors, length = self._collected, message.length
        if message.owner is None:
            return _OnItsWay(tensors, length, None)
        if len(tensors) == 1:
            memory = _bytes_of(tensors[0][1])
        else:
            memory = self._memory(length)
            views = _views(message, memory)
            for (_, view), (_, tensor) in zip(views, tensors, strict=True):
                view.copy_(tensor)
            tensors = views
        return _OnItsWay(tensors, length, self._group.broadcast(memory, self._group.say()))

    def _receive(self, message: Message, owner: int, *, wait: bool) -> _OnItsWay | None:
        if self._word is None:
            self._word = self._group.hear(owner)
        if not wait and not self._word.said:
            return None
        self._group.heard(self._word)
        memory = self._memory(message.length)
        broadcast = self._group.broadcast(memory, self._word)
        return _OnItsWay(_views(message, memory), message.length, broadcast)

    # Headers --------------------------------------------------------------------------------------

    def _check_headers(self) -> None:
        """Also where all ranks wait for each other: no broadcast is on its way afterwards."""
        expected = self._options.headers_sha256
        own: dict[str, str] | None = None
        failure: Exception | None = None
        try:
            rest = self._own.take()  # reads the headers that no tensor comes after
            assert rest is None
            headers = dict(self._own.headers)
            if expected is None:
                check_headers(self._source, headers, None, connections=self._options.connections)
                headers = {}
            own = {str(offset): header.hex() for offset, header in headers.items()}
        except Exception as error:  # noqa: BLE001 - raised below, when the others know
            failure = error
        found = self._group.gather(own)
        if failure is not None:
            raise failure
        every: dict[int, bytes] = {}
        for rank, theirs in enumerate(found):
            if theirs is None:
                raise OtherRankError(
                    f"Rank {rank} of those that load {self._source.name} could not check its "
                    "headers.",
                    hint="That rank's own error says why.",
                )
            for offset, text in theirs.items():
                header = bytes.fromhex(text)
                if every.setdefault(int(offset), header) != header:
                    raise CorruptError(
                        f"{self._source.name}: two ranks have read different headers.",
                        hint="It was replaced while it was read. Start again; upload models under "
                        "a new name instead of over an old one.",
                    )
        if expected is not None:
            check_headers(self._source, every, expected, connections=None)


def _views(message: Message, memory: torch.Tensor) -> list[tuple[TensorRecord, torch.Tensor]]:
    return [
        (record, shaped(record, memory[place : place + record.length]))
        for record, place in zip(message.records, message.places, strict=True)
    ]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a contiguous tensor as uint8."""
    return tensor.view(-1).view(torch.uint8)
