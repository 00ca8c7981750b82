"""How much host and device memory may one load take, and for what?

Of the host memory, a part is kept for later tensors, a part is for the connections' buffers, and
the rest, at least half, for tensors that the consumer has not taken yet. Tensors that wait on a
device have a budget of their own there. Where ranks share a load, each has a part for what goes
from rank to rank.
"""

from __future__ import annotations

from typing import NamedTuple

from tensorserve.loading.buffer_pool import BufferPool
from tensorserve.loading.byte_budget import ByteBudget
from tensorserve.loading.gpu_staging import GpuStaging
from tensorserve.loading.tuning import DEFAULTS


class SharedMemory(NamedTuple):
    """Bytes of host memory of a rank that shares a load."""

    own: int
    """For the part that it opens itself (`LoadOptions.ahead_bytes`)."""
    window: int
    """For messages that are on their way, or wait for the consumer."""
    kept: int
    """For memory of messages that waits to be used again."""


def shared_memory(limit: int, ranks: int) -> SharedMemory:
    """How a rank of `ranks` divides its `limit`."""
    lent = limit // DEFAULTS.window_part
    kept = lent // DEFAULTS.kept_part
    window = min(lent - kept, ranks * DEFAULTS.window_jobs * DEFAULTS.job_bytes)
    kept = min(kept, window)
    return SharedMemory(limit - window - kept, window, kept)


class LoadMemory:
    """The memory of one load, without the ring of a `GpuStaging`. Not thread-safe by itself."""

    def __init__(
        self, limit: int, strip: int, staging: GpuStaging | None, *, whole: bool, in_host: bool
    ) -> None:
        """`limit`: bytes of host memory; `strip`: of them the buffer of one connection. `whole`:
        every tensor comes together in host memory. `in_host`: some tensor may do so.
        """
        self._limit = limit
        self._staging = staging
        self._whole = whole
        self.in_host = in_host
        self.pool = BufferPool(self._kept)
        self.host, self.device = ByteBudget(), ByteBudget()
        # With staging, the parts in which its job begins and ends may wait for another job's range.
        self.connection_bytes = strip + (2 * DEFAULTS.part_bytes if staging is not None else 0)

    @property
    def most_connections(self) -> int:
        """The most connections that there is memory for."""
        return max(DEFAULTS.least_connections, self._for_connections // self.connection_bytes)

    def take(self, host: int, device: int, connections: int) -> bool:
        """Take that many bytes for a tensor, while there are `connections`; False if they do not
        fit, in which case none are taken.
        """
        most = self._staging.ahead_bytes if self._staging is not None else 0
        fits = self.host.fits(host, self._host_room(connections)) and self.device.fits(device, most)
        if fits:
            self.host.take(host)
            self.device.take(device)
        return fits

    def room(self, connections: int) -> int:
        """Bytes of tensors that may be pending or wait for the consumer."""
        if self._staging is None:
            return self._host_room(connections)
        if self._whole:
            return min(self._host_room(connections), self._staging.ahead_bytes)
        return self._staging.ahead_bytes

    @property
    def _kept(self) -> int:
        return self._limit // DEFAULTS.kept_part

    def _host_room(self, connections: int) -> int:
        left = self._limit - self._kept - connections * self.connection_bytes
        return max(self._limit // 2, left)

    @property
    def _for_connections(self) -> int:
        """Bytes of host memory for the buffers of all connections."""
        if self._staging is None or self.in_host:
            numerator, denominator = DEFAULTS.connections_part
            return self._limit * numerator // denominator
        # No tensors are in it. And half of the ring is for parts that arrive in several ranges.
        return self._limit - self._kept + self._staging.ring_bytes // 2
