"""How does vLLM ask for an adapter that it does not have? Its resolver interface.

Written for vLLM 0.32.0 (lora/resolver.py; asked by entrypoints/openai/models/serving.py,
`resolve_lora`, which gives each adapter that is found an id of its own).
"""

from __future__ import annotations

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from tensorserve.engine.adapters.refusal import UNKNOWN, AdapterRefused
from tensorserve.engine.adapters.serving import serving


class AdapterResolver(LoRAResolver):  # type: ignore[misc]
    """Finds adapters in the store of this process."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:  # noqa: ARG002
        """As LoRAResolver: None for what does not exist, which vLLM answers with 404.

        Raises HTTPException, which becomes the answer: 400 for an adapter that cannot be loaded,
        503 while the store cannot be reached or there is no room.
        """
        from fastapi import HTTPException

        if serving.store is None:
            return None
        try:
            held = await serving.store.resolve(lora_name)
        except AdapterRefused as refused:
            if refused.status == UNKNOWN:
                return None
            said = f"LoRA adapter '{lora_name}': {refused.said}"
            raise HTTPException(refused.status, said) from None
        # vLLM replaces the id.
        return LoRARequest(lora_name, 1, str(held.directory), base_model_name=serving.base_name)


def register_resolver() -> None:
    """In vLLM's registry, which its API server reads when it begins."""
    LoRAResolverRegistry.register_resolver("tensorserve", AdapterResolver())
