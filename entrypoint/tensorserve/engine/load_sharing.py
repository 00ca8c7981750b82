"""Do the ranks of one machine load their file together, each opening a part of it, or each all?

Together: where the user wants it, all tensor-parallel ranks are on this machine, and they read one
file in a checkpoint's layout. Weights that go from rank to rank are in clear: over a network
between machines they never go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.parallel_state import in_the_same_node_as
from vllm.distributed.stateless_coordinator import StatelessGroupCoordinator

from tensorserve.errors import OtherRankError
from tensorserve.loading.agreement import Offer
from tensorserve.telemetry.names import Sharing


def why_alone(setting: str, loader: str, device: torch.device, group: Any) -> Sharing | None:
    """Why each rank of `group` (vLLM's, of tensor-parallel ranks) reads all; None: it need not.

    `setting`: TENSORSERVE_SHARE_LOAD. All ranks call it, and come to the same answer.
    """
    if group.world_size == 1:
        return Sharing.ONE_RANK
    if setting == "off":
        return Sharing.OFF
    if setting == "auto":
        # gloo takes about as long as opening (docs/loader.md); NCCL was not run on a GPU yet.
        return Sharing.AUTO
    if loader == "reference":
        return Sharing.REFERENCE
    # Its ranks are not in torch's default group, whose store ours uses.
    if device.type not in {"cpu", "cuda"} or isinstance(group, StatelessGroupCoordinator):
        return Sharing.DEVICE
    return None if all(in_the_same_node_as(group.cpu_group)) else Sharing.MACHINES


def gathered(group: Any) -> Callable[[Offer], list[Offer]]:
    """What gathers offers over vLLM's `group`. It raises OtherRankError where a rank has ended."""

    def gather(offer: Offer) -> list[Offer]:
        found: list[Any] = [None] * group.world_size
        try:
            torch.distributed.all_gather_object(found, offer, group=group.cpu_group)
        except RuntimeError as error:
            raise OtherRankError(
                f"Another rank of this engine ended before the load ({str(error)[:500]}).",
                hint="That rank's own error says why.",
            ) from error
        return found

    return gather
