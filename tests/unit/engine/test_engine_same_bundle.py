"""Ranks that were given two bundles: real process groups of torch, two processes."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.engine.same_bundle import same_for_all
from tensorserve.errors import CorruptError, SourceUnavailableError, TensorserveError
from tensorserve.launch.context import Shard, Start

RANKS = 2


def found(digests: str) -> Start:
    """A start with one file of weights."""
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m"})
    shard = Shard("/m/model.tensors", None, 10, index_sha256="i", digests=digests)
    return Start(settings, make_plan(settings), (shard,))


def alike(_: int) -> Start:
    return found("aa")


def other(rank: int) -> Start:
    return found("aa" if rank == 0 else "bb")


def failing(rank: int) -> Start:
    if rank == 1:
        raise SourceUnavailableError("The server is away.")
    return found("aa")


CASES = (alike, other, failing)


def rank(number: int, store: str, said: str) -> None:
    """One rank: for each case what it raises, or what it found, goes into a file."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=RANKS
    )
    # As in vLLM: tensor-parallel ranks, then a group of its own for each pipeline stage.
    both = torch.distributed.new_group([0, 1])
    alone = [torch.distributed.new_group([one]) for one in range(RANKS)]
    for make in CASES:
        try:
            start = same_for_all(functools.partial(make, number), [both, alone[number]])
            text = str(start.shards[0].digests)
        except TensorserveError as error:
            text = f"{type(error).__name__}: {error.message}"
        Path(f"{said}{make.__name__}-{number}").write_text(text)


def test_ranks_load_one_bundle_or_none(tmp_path: Path) -> None:
    """All go on, or all end: none waits for another."""
    # Their imports (torch) once for both.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    store, said = str(tmp_path / "store"), str(tmp_path / "said-")
    processes = [server.Process(target=rank, args=(n, store, said)) for n in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)

    def said_of(make: Callable[[int], Start]) -> list[str]:
        texts = [Path(f"{said}{make.__name__}-{number}").read_text() for number in range(RANKS)]
        return [text.partition(".")[0] for text in texts]

    assert said_of(alike) == ["aa", "aa"]
    different = "CorruptError: The ranks of this engine found different bundles"
    assert said_of(other) == [different, different]
    assert said_of(failing) == [
        "CorruptError: Another rank of this engine could not check the bundle",
        "SourceUnavailableError: The server is away",
    ]


def test_a_rank_alone_needs_nobody() -> None:
    """No group: what was found; what was raised comes as it is."""
    assert same_for_all(lambda: alike(0), []) == alike(0)
    with pytest.raises(SourceUnavailableError):
        same_for_all(lambda: failing(1), [])
    with pytest.raises(CorruptError):
        same_for_all(lambda: corrupt(), [])


def corrupt() -> Start:
    raise CorruptError("damaged")
