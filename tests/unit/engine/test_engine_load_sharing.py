"""Why do ranks of vLLM's not share a load, and whose error ends the start?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from tensorserve.engine import load_sharing
from tensorserve.engine.load_sharing import gathered, why_alone
from tensorserve.errors import OtherRankError
from tensorserve.telemetry.names import Sharing

CPU, GPU, OTHER = (torch.device(name) for name in ("cpu", "cuda", "xpu"))


@pytest.mark.parametrize(
    ("setting", "loader", "device", "ranks", "here", "expected"),
    [
        ("on", "auto", CPU, 2, True, None),
        ("on", "auto", GPU, 8, True, None),
        ("on", "auto", CPU, 1, True, Sharing.ONE_RANK),
        ("off", "auto", CPU, 2, True, Sharing.OFF),
        ("auto", "auto", CPU, 2, True, Sharing.AUTO),
        ("auto", "auto", GPU, 2, True, Sharing.AUTO),
        ("on", "reference", CPU, 2, True, Sharing.REFERENCE),
        ("on", "auto", OTHER, 2, True, Sharing.DEVICE),
        ("on", "auto", CPU, 2, False, Sharing.MACHINES),
    ],
)
def test_ranks_load_alone_unless_all_speaks_for_it(
    setting: str, loader: str, device: torch.device, ranks: int, here: bool,
    expected: Sharing | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Not over a network: what goes from rank to rank is in clear."""
    monkeypatch.setattr(load_sharing, "in_the_same_node_as", lambda _: [True, here])
    group = SimpleNamespace(world_size=ranks, cpu_group=None)
    assert why_alone(setting, loader, device, group) is expected


def test_a_rank_that_ended_before_is_not_this_ones_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gloo says only that a connection was closed."""

    def closed(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_gather_object", closed)
    group: Any = SimpleNamespace(world_size=2, cpu_group=None)
    with pytest.raises(OtherRankError, match="ended before the load"):
        gathered(group)(None)  # type: ignore[arg-type]
