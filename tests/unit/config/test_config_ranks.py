"""How many ranks are here, and what part each holds, from the flags of `vllm serve`."""

from __future__ import annotations

import pytest

from tensorserve.config.ranks import Parallel, Ranks
from tensorserve.config.vllm_arguments import parse_arguments
from tensorserve.config.vllm_options import options_of


@pytest.mark.parametrize(
    ("words", "tensor_parallel", "ranks"),
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
        ("--nnodes=x", 1, Ranks()),
    ],
)
def test_ranks_follow_from_the_flags(words: str, tensor_parallel: int, ranks: Ranks) -> None:
    """As vLLM's own flags say."""
    arguments = parse_arguments([*words.split(), "-tp", str(tensor_parallel)])
    assert options_of(arguments).parallel.ranks == ranks


def test_a_ranks_part_is_its_share() -> None:
    """Tensor- and pipeline-parallel ranks hold the weights together."""
    assert Ranks(8, 4, 2).part(80) == 10


@pytest.mark.parametrize(
    ("parallel", "only"),
    [
        (Parallel(tensor=4), True),
        (Parallel(tensor=4, data_here=1), True),
        (Parallel(pipeline=2), False),
        (Parallel(data=2), False),
        (Parallel(data_here=2), False),
        (Parallel(nodes=2), False),
    ],
)
def test_whether_all_ranks_here_are_tensor_parallel(parallel: Parallel, only: bool) -> None:
    """Only then can one process know when all of them are past a byte."""
    assert parallel.only_tensor == only
