"""How many ranks are here, and what part each holds, from the flags of `vllm serve`."""

from __future__ import annotations

import pytest

from tensorserve.ranks import Ranks, has_flag, ranks_of


@pytest.mark.parametrize(
    ("argv", "tensor_parallel", "ranks"),
    [
        ("", 1, Ranks()),
        ("", 4, Ranks(4, 4)),
        ("--pipeline-parallel-size=2", 4, Ranks(8, 8)),
        ("-pp 2", 1, Ranks(2, 2)),
        ("--pipeline_parallel_size 2", 1, Ranks(2, 2)),
        ("--nnodes=2 -pp 2", 8, Ranks(16, 8, 2)),
        ("--data-parallel-size 4", 2, Ranks(2, 8)),
        ("-dp 4 --data-parallel-size-local 2", 2, Ranks(2, 4)),
        ("-dp=16 -dpl=8", 1, Ranks(1, 8)),
        ("-dp 4 -dpl 0", 2, Ranks(2, None)),
        ("-dp 8 --enable-expert-parallel", 1, Ranks(8, 8)),
        ("-dp 8 -ep --data-parallel-rank 3", 1, Ranks(8, 1)),
        ("--distributed-executor-backend=ray", 16, Ranks(16, None)),
        ("-dp 4 -dpb ray", 1, Ranks(1, None)),
        ("--nnodes", 1, Ranks()),
        ("--nnodes=x", 1, Ranks()),
    ],
)
def test_ranks_follow_from_the_flags(argv: str, tensor_parallel: int, ranks: Ranks) -> None:
    """As vLLM's own flags say."""
    assert ranks_of(("vllm", "serve", *argv.split()), tensor_parallel) == ranks


def test_a_ranks_part_is_its_share() -> None:
    """Tensor- and pipeline-parallel ranks hold the weights together."""
    assert Ranks(8, 4, 2).part(80) == 10


def test_a_flag_is_found_in_each_of_its_spellings() -> None:
    """With dashes, underscores and a value."""
    argv = ("--quantization=fp8", "--cpu_offload_gb", "4")
    assert has_flag(argv, "--quantization")
    assert has_flag(argv, "--cpu-offload-gb")
    assert not has_flag(argv, "--offload-backend")
