"""For which recipients is the model's key wrapped in a manifest?

The member `wrapped_keys` of manifest.json. It is read before the manifest is authenticated, since
the key that authenticates it comes from there: counts, lengths and characters are bounded first,
and nothing in it is an address.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from tensorserve.bundle.json_fields import JsonFields
from tensorserve.wrapping.base import Binding, WrappedKey

MEMBER = "wrapped_keys"
MOST_RECIPIENTS = 16
_KIND = re.compile(r"[a-z][a-z0-9]{1,15}")
# ARNs, age's recipients, paths of Vault.
_NAME = re.compile(r"[A-Za-z0-9:/_.+=@-]{1,512}")
# AWS KMS gives up to 6144 bytes, which are 8192 characters of base64.
_WRAPPED = re.compile(r"[A-Za-z0-9:/_.+=-]{1,8192}")


@dataclass(frozen=True)
class WrappedKeys:
    """A model's key, wrapped for each of its recipients."""

    fingerprint: str
    """Of the model's key (wrapping.base.fingerprint_of), in hex."""
    recipients: tuple[WrappedKey, ...]

    @classmethod
    def from_json(cls, value: object) -> WrappedKeys:
        """From a manifest's member. Raises ValueError if it is invalid."""
        fields = JsonFields(value, MEMBER)
        entries = fields.items("recipients")
        if not 0 < len(entries) <= MOST_RECIPIENTS:
            raise ValueError(f"{MEMBER} has {len(entries)} recipients, not 1 to {MOST_RECIPIENTS}")
        recipients = tuple(_recipient(JsonFields(entry, "a recipient")) for entry in entries)
        return cls(fields.digest("fingerprint"), recipients)

    def to_json(self) -> dict[str, Any]:
        """The manifest's member."""
        return asdict(self)

    def binding(self, salt: bytes) -> Binding:
        """What the keys are bound to; `salt` is that of the manifest's authentication."""
        return Binding(salt.hex(), self.fingerprint)


def _recipient(fields: JsonFields) -> WrappedKey:
    provider, key, wrapped = (fields.text(name) for name in ("provider", "key", "wrapped"))
    for text, pattern, what in (
        (provider, _KIND, "provider"),
        (key, _NAME, "key"),
        (wrapped, _WRAPPED, "wrapped"),
    ):
        if not pattern.fullmatch(text):
            raise ValueError(f"{what!r} of a recipient is too long, empty or has other characters")
    return WrappedKey(provider, key, wrapped)
