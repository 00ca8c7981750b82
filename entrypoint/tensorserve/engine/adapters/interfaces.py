"""What does the store of adapters need of where they come from, and of vLLM?"""

from __future__ import annotations

from typing import Protocol

from tensorserve.engine.adapters.source import Held
from tensorserve.launch.adapter_store import Found


class Store(Protocol):
    """Where adapters come from (engine/adapters/source.py). The methods wait, and raise
    AdapterRefused."""

    def find(self, name: str) -> Found:
        """The adapter's manifest."""
        ...

    def hold(self, found: Found) -> Held:
        """The adapter, in memory."""
        ...


class Engine(Protocol):
    """What the store needs of vLLM (engine/adapters/vllm_side.py)."""

    def forget(self, name: str) -> None:
        """New requests for `name` are to ask the resolver again."""
        ...

    def tidy(self) -> None:
        """Forget what names were asked for that do not exist."""
        ...

    def uses(self, lora_id: int) -> bool:
        """Whether a request that has not ended uses the adapter."""
        ...

    async def unload(self, lora_id: int) -> None:
        """Free the workers' memory of the adapter."""
        ...
