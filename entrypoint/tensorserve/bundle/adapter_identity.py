"""What does the manifest of a single adapter say of it: its name, and the model that it is for?

An adapter that `tensorserve pack-adapter` packed is a bundle of its own. All adapters of a store
may have the same key, so the manifest binds the name: one that was copied into the folder of
another is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tensorserve.bundle.json_fields import JsonFields

MEMBER = "adapter"
# The name is a model name in requests, a directory name, and part of a vLLM flag.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MOST_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class AdapterIdentity:
    """Which adapter a bundle holds."""

    name: str
    base_model_name: str | None = None
    """The served name of the model that it is for; None: it was not said."""

    @classmethod
    def from_json(cls, value: object) -> AdapterIdentity:
        """From a manifest's `adapter` member. Raises ValueError if it is invalid."""
        fields = JsonFields(value, MEMBER)
        name, base = fields.text("name"), fields.get("base_model_name")
        if not ADAPTER_NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is not the name of an adapter")
        if base is not None and not is_model_name(base):
            raise ValueError(f"'base_model_name' of {MEMBER} is not the name of a model")
        return cls(name, None if base is None else str(base))

    def to_json(self) -> dict[str, Any]:
        """The `adapter` member of a manifest."""
        return {"name": self.name, "base_model_name": self.base_model_name}


def is_model_name(value: object) -> bool:
    """Whether `value` may be the name under which a model is served."""
    return isinstance(value, str) and 0 < len(value) <= _MOST_CHARACTERS and value.isprintable()
