"""How is one chunk sealed, and with which parameters is a passphrase made into a key?

The counterpart of crypto.open_chunk, through the same libsodium (XSalsa20-Poly1305, detached tag).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

from tensorserve.format import crypto
from tensorserve.format.crypto import KEY_SIZE, NONCE_SIZE, SALT_SIZE, TAG_SIZE
from tensorserve.format.header import PasswordHash

# libsodium's "moderate" preset, which tensorizer's EncryptionParams.from_string uses:
# about half a second and 256 MiB (https://doc.libsodium.org/password_hashing/default_phf).
MODERATE_PASSES = 3
MODERATE_MEMORY = 256 * 1024**2


def fresh_password_hash() -> PasswordHash:
    """Parameters for a new file: tensorizer's defaults and a random salt."""
    return PasswordHash(passes=MODERATE_PASSES, memory=MODERATE_MEMORY, salt=os.urandom(SALT_SIZE))


def fresh_nonce() -> bytes:
    """24 random bytes: 192 bits, so that two files under one key never meet by chance."""
    return os.urandom(NONCE_SIZE)


@cache
def _seal() -> ctypes._NamedFuncPointer:
    # A function object of our own: crypto.py sets up only what it calls itself.
    function = crypto._sodium().crypto_secretbox_detached
    function.argtypes = (
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_ulonglong),
        *(ctypes.c_char_p, ctypes.c_char_p),
    )
    return function


def seal_chunk(key: bytes, nonce: bytes, data: memoryview) -> bytes:
    """Encrypts ``data`` in place and gives its 16-byte tag.

    A nonce must never be used twice with one key. ValueError for lengths that do not fit.
    Thread-safe; releases the GIL.
    """
    if len(key) != KEY_SIZE or len(nonce) != NONCE_SIZE:
        raise ValueError("key and nonce must be of 32 and 24 bytes")
    tag = ctypes.create_string_buffer(TAG_SIZE)
    with crypto._address(data, crypto._CONTIGUOUS_WRITABLE) as address:
        if _seal()(address, tag, address, data.nbytes, nonce, key):
            raise ValueError(f"libsodium cannot seal {data.nbytes} bytes at once")
    return tag.raw
