"""Which backend does XSalsa20-Poly1305 use: libsodium, or this package's secretbox.c?

secretbox.c needs AVX-512 IFMA (Intel since Ice Lake, AMD since Zen 4) and is two to three times as
fast. It is built at installation if there is a compiler. libsodium is always needed, for key
derivation and for other processors.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tensorserve.errors import ConfigurationError

KEY_SIZE = 32
NONCE_SIZE = 24
TAG_SIZE = 16
# The size of struct box in secretbox.c, and the type of a strip's hash.
BOX_STATE_BYTES = 128
StripHash = ctypes.c_uint64 * 3

# A sample that uses every path of the cipher: whole vector rounds and a remainder.
_PLAIN = bytes(i * 89 % 256 for i in range(2347))
_KEY, _NONCE = bytes(range(KEY_SIZE)), bytes(range(NONCE_SIZE))
_PACKAGE_HINT = "Install it: `apt-get install libsodium23` (Debian, Ubuntu)."


class Strips(NamedTuple):
    """The functions of secretbox.c for opening a chunk in strips (incremental.py)."""

    begin: Any  # (state, nonce, key)
    open: Any  # (state, hash, out, sealed, offset, length)
    check: Any  # (state, hashes, lengths, count, tag) -> 0 if the tag is valid


class Box(NamedTuple):
    """A backend of secretbox: C functions with libsodium's arguments."""

    name: str
    open: Any  # (out, sealed, tag, length, nonce, key) -> 0 if the tag is valid
    seal: Any  # (out, tag, plain, length, nonce, key)
    strips: Strips | None = None


def sodium_box() -> Box:
    """libsodium's backend. Raises ConfigurationError if libsodium is not installed."""
    library = sodium()
    box = Box(
        "libsodium", library.crypto_secretbox_open_detached, library.crypto_secretbox_detached
    )
    return _declared(box)


@cache
def own_box() -> Box | None:
    """secretbox.c's backend; None if it was not built, or not for this processor."""
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name("_secretbox.so")))
    except OSError:
        return None
    if not library.box_supported():
        return None
    strips = Strips(library.box_begin, library.box_open_strip, library.box_check)
    box = _declared(Box("AVX-512", library.box_open, library.box_seal, strips))
    # A self-test, once for each process, which takes microseconds: an emulated processor may report
    # instructions that it executes wrongly.
    expected = _sample(sodium_box())
    return box if _sample(box) == expected and _opens_in_strips(strips, *expected) else None


@cache
def fastest_box() -> Box:
    """The backend of `open_chunk` and `seal_chunk`: secretbox.c's if possible, else libsodium's."""
    return own_box() or sodium_box()


def _declared(box: Box) -> Box:
    box.open.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulonglong),
        *(ctypes.c_char_p, ctypes.c_char_p),
    )
    box.seal.argtypes = (
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_ulonglong),
        *(ctypes.c_char_p, ctypes.c_char_p),
    )
    if box.strips is not None:
        box.strips.begin.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
        box.strips.begin.restype = None
        box.strips.open.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_uint64, ctypes.c_uint64),
        )
        box.strips.open.restype = None
        box.strips.check.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64),
            ctypes.c_char_p,
        )
    return box


def _sample(box: Box) -> tuple[bytes, bytes]:
    """The sample sealed by `box`: (ciphertext, tag)."""
    out = ctypes.create_string_buffer(len(_PLAIN))
    tag = ctypes.create_string_buffer(TAG_SIZE)
    box.seal(out, tag, _PLAIN, len(_PLAIN), _NONCE, _KEY)
    return out.raw, tag.raw


def _opens_in_strips(strips: Strips, sealed: bytes, tag: bytes) -> bool:
    """Whether the sample is opened correctly in two strips, the second one first."""
    state = ctypes.create_string_buffer(BOX_STATE_BYTES)
    out = ctypes.create_string_buffer(sealed, len(sealed))
    address = ctypes.addressof(out)
    hashes = (StripHash * 2)()
    lengths = (ctypes.c_uint64 * 2)(1152, len(sealed) - 1152)
    strips.begin(state, _NONCE, _KEY)
    for number, offset in ((1, 1152), (0, 0)):
        here = address + offset
        strips.open(state, hashes[number], here, here, offset, lengths[number])
    return not strips.check(state, hashes, lengths, 2, tag) and out.raw == _PLAIN


@cache
def sodium() -> ctypes.CDLL:
    """libsodium, initialised. Raises ConfigurationError if it is not installed."""
    # Tried by name first: find_library needs ldconfig or a compiler, which slim images lack.
    tried = ("libsodium.so.23", "libsodium.so.26", ctypes.util.find_library("sodium"))
    for name in filter(None, tried):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        break
    else:
        raise ConfigurationError(
            "libsodium is not installed; encrypted files need it.", hint=_PACKAGE_HINT
        )
    library.crypto_pwhash.argtypes = (
        *(ctypes.c_char_p, ctypes.c_ulonglong, ctypes.c_char_p, ctypes.c_ulonglong),
        *(ctypes.c_char_p, ctypes.c_ulonglong, ctypes.c_size_t, ctypes.c_int),
    )
    if library.sodium_init() < 0:
        raise ConfigurationError("libsodium cannot be initialised.", hint=_PACKAGE_HINT)
    return library
