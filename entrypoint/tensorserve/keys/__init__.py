"""Keys: what was given becomes 32 bytes for a file, and is proven before anything depends on it."""

from tensorserve.format.header import FileKey
from tensorserve.keys.given import (
    GivenKey,
    ModelKey,
    Passphrase,
    parse_key,
    parse_passphrase,
)
from tensorserve.keys.prove import prove_key

__all__ = [
    "FileKey",
    "GivenKey",
    "ModelKey",
    "Passphrase",
    "parse_key",
    "parse_passphrase",
    "prove_key",
]
