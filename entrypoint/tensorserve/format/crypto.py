"""How is one chunk opened or sealed, and a key derived?

The C behind it (box.py) is called through ctypes, which releases the GIL: threads decrypt in
parallel.
Primitives: crypto_secretbox (XSalsa20-Poly1305, https://doc.libsodium.org/secret-key_cryptography/
secretbox) and crypto_pwhash (Argon2id 1.3, RFC 9106, https://doc.libsodium.org/password_hashing).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format.box import KEY_SIZE, NONCE_SIZE, TAG_SIZE, fastest_box, sodium
from tensorserve.memory_group import available_bytes

SALT_SIZE = 16
ALGORITHM_ARGON2ID13 = 2

# libsodium's own presets end at 4 passes over 1 GiB (about 3 s). The limits leave room above that
# and keep a forged header from taking the machine's memory or hours of its time.
MIN_DERIVATION_MEMORY = 8 * 1024
MAX_DERIVATION_MEMORY = 4 * 1024**3  # bytes
MAX_DERIVATION_PASSES = 2**16
MAX_DERIVATION_WORK = 64 * 1024**3  # bytes times passes: about a minute


# Of what is left: the rest is for what happens beside it.
_SHARE_OF_MEMORY = 0.8


class TagMismatchError(CorruptError):
    """A chunk's tag does not fit: another key sealed it, or its bytes changed since."""


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
    """The memory address of ``data``, which stays where it is inside the with block.

    ctypes' own from_buffer() takes no read-only memory, which mapped files are. BufferError if
    ``data`` is not contiguous, or not writable where ``flags`` ask for it.
    """
    view = _PyBuffer()
    _get_buffer(data, ctypes.byref(view), flags)
    try:
        yield view.buf or 0
    finally:
        _release_buffer(ctypes.byref(view))


def readable(data: bytes | memoryview) -> AbstractContextManager[int]:
    """The address of `data`, for C that reads it. BufferError if it is not contiguous."""
    return _address(data, _CONTIGUOUS)


def writable(data: memoryview) -> AbstractContextManager[int]:
    """The address of `data`, for C that writes it. BufferError if that is not allowed."""
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

    ``out`` may be ``ciphertext`` itself. The tag is checked before anything is written, so on
    TagMismatchError ``out`` is as it was; the caller adds which tensor it was. ValueError for
    lengths that do not fit. Thread-safe; releases the GIL.
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
    """Encrypts ``plaintext`` into ``out``, of the same length in bytes; gives the 16-byte tag.

    ``out`` may be ``plaintext`` itself. A nonce must never be used twice with one key. ValueError
    for lengths that do not fit. Thread-safe; releases the GIL.
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
    """The 32-byte key that Argon2id 1.3 makes of ``passphrase``, as tensorizer derives it.

    ``passes`` is libsodium's opslimit; ``memory`` its memlimit, in bytes; ``asked_by`` names whose
    parameters they are. Takes seconds and that much memory. Raises CorruptError for parameters
    beyond the limits above, ConfigurationError if the memory cannot be had.
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
            hint="If that is meant, derive the key yourself and give it as TENSORSERVE_KEY_FILE. "
            "Otherwise the file is damaged or forged.",
        )
    # A header is not authenticated before there is a key: its word must not end the container.
    left = available_bytes()
    if left is not None and memory > left * _SHARE_OF_MEMORY:
        raise ConfigurationError(
            f"{asked_by} asks for a key derivation over {memory // 2**20} MiB of memory, of which "
            f"{left // 2**20} MiB are left here.",
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
            "which is not to be had.",
            hint="Raise the container's memory limit, or give the derived key as "
            "TENSORSERVE_KEY_FILE.",
        )
    return key.raw
