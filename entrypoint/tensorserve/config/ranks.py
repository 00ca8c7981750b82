"""How many of the model's ranks run on this machine, and how are the weights shared among them?

From the parallel sizes of `vllm serve` (0.32.0) alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Where a model's parts are held."""

    parts: int = 1
    """Ranks that hold the weights together, each an equal part of them."""
    here: int | None = 1
    """Ranks on this machine; None where it is not known."""
    machines: int = 1

    def part(self, data_bytes: int) -> int:
        """Bytes of the weights that a rank holds."""
        return data_bytes // self.parts


@dataclass(frozen=True)
class Parallel:
    """The parallel sizes of one `vllm serve`."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    """Replicas of the model."""
    data_here: int | None = None
    """Replicas on this machine; None: not given, all of them."""
    nodes: int = 1
    experts: bool = False
    """Whether experts are spread over all replicas."""
    by_ray: bool = False
    """Whether Ray places ranks, perhaps on other machines."""
    one_replica: bool = False
    """Whether this server runs one replica of several that other servers run."""

    @property
    def ranks(self) -> Ranks:
        """Where the ranks of this server are."""
        model = self.tensor * self.pipeline
        # What is not an expert each replica has. So this is the least that a rank holds.
        parts = model * self.data if self.experts else model
        if self.by_ray or self.data_here == 0:
            return Ranks(parts, None, self.nodes)
        if self.nodes > 1:
            return Ranks(parts, max(1, model // self.nodes), self.nodes)
        replicas = 1 if self.one_replica else self.data
        return Ranks(parts, model * (replicas if self.data_here is None else self.data_here))

    @property
    def only_tensor(self) -> bool:
        """Whether the ranks on this machine are the tensor-parallel ones, and no others."""
        return self.pipeline == self.data == self.nodes == 1 and self.data_here in {None, 1}
