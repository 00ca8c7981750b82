"""How many of the model's ranks run on this machine, and how are the weights shared among them?

From the flags of `vllm serve` (0.32.0) alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# With these, ranks may be on machines that only Ray knows.
_BY_RAY = (("--distributed-executor-backend",), ("--data-parallel-backend", "-dpb"))
# With these, a deployment has other replicas beside this server's one.
_ONE_REPLICA = ("--data-parallel-rank", "-dpn", "--data-parallel-external-lb")


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


def ranks_of(argv: tuple[str, ...], tensor_parallel_size: int) -> Ranks:
    """The ranks of one `vllm serve` with `argv`."""
    pipeline = _number(argv, 1, "--pipeline-parallel-size", "-pp")
    replicas = _number(argv, 1, "--data-parallel-size", "-dp")
    nodes = _number(argv, 1, "--nnodes", "-n")
    model = tensor_parallel_size * pipeline
    experts = has_flag(argv, "--enable-expert-parallel", "-ep")
    # Experts are spread over all replicas; what else there is, each replica has. So this is the
    # least that a rank holds.
    parts = model * replicas if experts else model
    local = ("--data-parallel-size-local", "-dpl")
    if (
        any(flag_value(argv, *names) == "ray" for names in _BY_RAY)
        or flag_value(argv, *local) == "0"
    ):
        return Ranks(parts, None, nodes)
    if any(has_flag(argv, name) for name in _ONE_REPLICA):
        replicas = 1
    replicas = _number(argv, replicas, *local)
    if nodes > 1:
        return Ranks(parts, max(1, model // nodes), nodes)
    return Ranks(parts, model * replicas)


def flag_value(argv: tuple[str, ...], *names: str) -> str | None:
    """The last value that one of `names` ("--nnodes", "-n") is given in `argv`."""
    found = None
    for number, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if _spelled(name) in names:
            following = argv[number + 1] if number + 1 < len(argv) else None
            found = value if equals else following
    return found


def has_flag(argv: tuple[str, ...], *names: str) -> bool:
    """Whether one of `names` stands in `argv`, with a value or without."""
    return any(_spelled(word.partition("=")[0]) in names for word in argv)


def _spelled(name: str) -> str:
    return name.replace("_", "-") if name.startswith("--") else name


def _number(argv: tuple[str, ...], default: int, *names: str) -> int:
    """vLLM itself refuses what is no number; here it counts as not given."""
    text = flag_value(argv, *names)
    if text is None or not re.fullmatch(r"[0-9]{1,6}", text):
        return default
    return int(text) or default
