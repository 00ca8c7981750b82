"""How are model loaders registered as load formats of vLLM?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader


def register_loaders(loaders: Mapping[str, type[BaseModelLoader]]) -> None:
    """Registers each {load format: loader class} in vLLM, replacing one of the same name."""
    from vllm.model_executor.model_loader import register_model_loader

    for load_format, loader in loaders.items():
        register_model_loader(load_format)(loader)
