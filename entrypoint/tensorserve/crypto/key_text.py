"""How is a 32-byte key read from what a user gives: raw, hex or base64?"""

from __future__ import annotations

import base64
import binascii

from tensorserve.crypto.backends import KEY_SIZE


def key_bytes(value: bytes) -> bytes | None:
    """The 32 bytes in `value`: raw, or as hex or base64 text (padding optional); None for others.

    White space around text is ignored.
    """
    if len(value) == KEY_SIZE:
        return value
    text = value.removeprefix(b"\xef\xbb\xbf").strip()  # without an editor's byte order mark
    for decode in (_from_hex, _from_base64):
        key = decode(text)
        if key is not None and len(key) == KEY_SIZE:
            return key
    return None


def _from_hex(text: bytes) -> bytes | None:
    try:
        return binascii.unhexlify(text)
    except binascii.Error:
        return None


def _from_base64(text: bytes) -> bytes | None:
    standard = text.rstrip(b"=").replace(b"-", b"+").replace(b"_", b"/")
    try:
        return base64.b64decode(standard + b"=" * (-len(standard) % 4), validate=True)
    except binascii.Error:
        return None
