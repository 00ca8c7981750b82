"""How is one chunk sealed or opened, and how is a key derived from a passphrase?

The C backend (backends.py) is called through ctypes, which releases the GIL, so that threads
decrypt in parallel. Primitives: crypto_secretbox (XSalsa20-Poly1305,
https://doc.libsodium.org/secret-key_cryptography/secretbox) and crypto_pwhash (Argon2id 1.3, RFC
9106, https://doc.libsodium.org/password_hashing).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from tensorserve.cgroup_memory import available_bytes
from tensorserve.crypto.backends import KEY_SIZE, NONCE_SIZE, TAG_SIZE, fastest_box, sodium
from tensorserve.errors import ConfigurationError, CorruptError

SALT_SIZE = 16
ALGORITHM_ARGON2ID13 = 2

# libsodium's strongest preset is 4 passes over 1 GiB (about 3 s). The limits allow more than that,
# but prevent a forged header from using all memory or hours of time.
MIN_DERIVATION_MEMORY = 8 * 1024
MAX_DERIVATION_MEMORY = 4 * 1024**3  # bytes
MAX_DERIVATION_PASSES = 2**16
MAX_DERIVATION_WORK = 64 * 1024**3  # bytes × passes: about a minute


# The share of the available memory that a derivation may use.
_SHARE_OF_MEMORY = 0.8


class TagMismatchError(CorruptError):
    """A chunk's tag is not valid: another key sealed it, or its bytes have changed."""


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer; its layout is part of the stable ABI since Python 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None
_CONTIGUOUS, _CONTIGUOUS_WRITABLE = 0, 1  # PyBUF_SIMPLE, PyBUF_WRITABLE


@contextmanager
def _address(data: bytes | memoryview, flags: int) -> Iterator[int]:
    """The memory address of ``data``, valid inside the with block.

    ctypes' from_buffer() refuses read-only memory, such as mapped files. Raises BufferError if
    ``data`` is not contiguous, or not writable although ``flags`` require it.
    """
    view = _PyBuffer()
    _get_buffer(data, ctypes.byref(view), flags)
    try:
        yield view.buf or 0
    finally:
        _release_buffer(ctypes.byref(view))


def readable(data: bytes | memoryview) -> AbstractContextManager[int]:
    """The address of `data`, for reading in C. Raises BufferError if it is not contiguous."""
    return _address(data, _CONTIGUOUS)


def writable(data: memoryview) -> AbstractContextManager[int]:
    """The address of `data`, for writing in C. Raises BufferError if it is not writable."""
    return _address(data, _CONTIGUOUS_WRITABLE)


def nonce_at(first: bytes, index: int) -> bytes:
    """The nonce of chunk ``index``: (first + index) mod 2^192, little-endian, 24 bytes."""
    number = int.from_bytes(first, "little") + index
    number %= 1 << 8 * NONCE_SIZE
    return number.to_bytes(NONCE_SIZE, "little")


def open_chunk(
    key: bytes, nonce: bytes, tag: bytes | memoryview, ciphertext: memoryview, out: memoryview
) -> None:
    """Authenticates ``ciphertext`` and decrypts it into ``out``, of the same length in bytes.

    ``key`` has 32 bytes, ``nonce`` 24, ``tag`` 16. ``out`` may be ``ciphertext`` itself. Raises
    TagMismatchError before anything is written to ``out`` (the caller adds the tensor's name), and
    ValueError for wrong lengths. Thread-safe; releases the GIL.
    """
    tag = bytes(tag)
    if len(key) != KEY_SIZE or len(nonce) != NONCE_SIZE or len(tag) != TAG_SIZE:
        raise ValueError("key, nonce and tag must be of 32, 24 and 16 bytes")
    if ciphertext.nbytes != out.nbytes:
        raise ValueError(f"{ciphertext.nbytes} bytes do not fit {out.nbytes}")
    with readable(ciphertext) as source, writable(out) as target:
        failed = fastest_box().open(target, source, tag, ciphertext.nbytes, nonce, key)
    if failed:
        raise TagMismatchError("The authentication tag of a chunk does not fit.")


def seal_chunk(key: bytes, nonce: bytes, plaintext: memoryview, out: memoryview) -> bytes:
    """Encrypts ``plaintext`` into ``out``, of the same length in bytes; returns the 16-byte tag.

    ``key`` has 32 bytes, ``nonce`` 24. ``out`` may be ``plaintext`` itself. A nonce must never be
    used twice with one key. Raises ValueError for wrong lengths. Thread-safe; releases the GIL.
    """
    if len(key) != KEY_SIZE or len(nonce) != NONCE_SIZE:
        raise ValueError("key and nonce must be of 32 and 24 bytes")
    if plaintext.nbytes != out.nbytes:
        raise ValueError(f"{plaintext.nbytes} bytes do not fit {out.nbytes}")
    tag = ctypes.create_string_buffer(TAG_SIZE)
    with readable(plaintext) as source, writable(out) as target:
        fastest_box().seal(target, tag, source, plaintext.nbytes, nonce, key)
    return tag.raw


def derive_key(
    passphrase: bytes, *, salt: bytes, passes: int, memory: int, asked_by: str = "The file"
) -> bytes:
    """The 32-byte key that Argon2id 1.3 derives from ``passphrase``, as tensorizer derives it.

    ``passes`` is libsodium's opslimit, ``memory`` its memlimit in bytes, ``salt`` has 16 bytes;
    ``asked_by`` names the file with these parameters in errors. Takes seconds and ``memory`` bytes.
    Raises CorruptError for parameters beyond the limits above, ConfigurationError if there is not
    enough memory.
    """
    if not (
        len(salt) == SALT_SIZE
        and MIN_DERIVATION_MEMORY <= memory <= MAX_DERIVATION_MEMORY
        and 1 <= passes <= MAX_DERIVATION_PASSES
        and passes * memory <= MAX_DERIVATION_WORK
    ):
        raise CorruptError(
            f"{asked_by} asks for a key derivation of {passes} passes over {memory} bytes, "
            "which is out of bounds.",
            hint="If it is intended, derive the key yourself and give it as TENSORSERVE_KEY_FILE. "
            "Otherwise the file is damaged or forged.",
        )
    # The parameters are not authenticated before the key is derived: a forged value must not use up
    # the container's memory.
    left = available_bytes()
    if left is not None and memory > left * _SHARE_OF_MEMORY:
        raise ConfigurationError(
            f"{asked_by} asks for a key derivation over {memory // 2**20} MiB of memory; "
            f"{left // 2**20} MiB are available here.",
            hint="Raise the container's memory limit, or derive the key elsewhere and give it as "
            "TENSORSERVE_KEY_FILE. If the file is not yours, it may be forged.",
        )
    key = ctypes.create_string_buffer(KEY_SIZE)
    failed = sodium().crypto_pwhash(
        key, KEY_SIZE, passphrase, len(passphrase), salt, passes, memory, ALGORITHM_ARGON2ID13
    )
    if failed:
        raise ConfigurationError(
            f"Deriving the key from the passphrase needs {memory // 2**20} MiB of memory, "
            "which could not be allocated.",
            hint="Raise the container's memory limit, or give the derived key as "
            "TENSORSERVE_KEY_FILE.",
        )
    return key.raw
