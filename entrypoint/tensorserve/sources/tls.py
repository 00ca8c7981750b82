"""What comes within TLS, many records a call: by tls.c where it was built, else by Python's ssl."""

from __future__ import annotations

import ctypes
import ssl
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# From here on, the next record of a slow connection ends the gathering.
_GATHER_SECONDS = 0.025
# SSL_get_error's values (OpenSSL's ssl.h), and those of tls.c beside them.
_SSL, _SYSCALL, _INTERRUPTED, _NOTHING_IN_TIME = 1, 5, -2, -1
# SSL_R_UNEXPECTED_EOF_WHILE_READING (OpenSSL's sslerr.h), in the part of a code that is the reason.
_UNEXPECTED_END, _REASON_BITS = 294, 0x7FFFFF


class _End(ctypes.Structure):
    """struct end of tls.c."""

    _fields_ = (
        ("error", ctypes.c_int32),
        ("number", ctypes.c_int32),
        ("reason", ctypes.c_uint64),
    )


class _Functions(NamedTuple):
    """Of tls.c and of the OpenSSL that Python's ssl uses."""

    receive: Any
    openssl: Any
    """struct openssl of tls.c."""
    say: Any
    """(code) -> what it means, in OpenSSL's words."""


def receiver(tls: ssl.SSLSocket, seconds: float, size: int) -> Callable[[memoryview], int]:
    """A function that fills memory from `tls`, at most `size` bytes a call, and gives their count.

    It waits for the first byte at most `seconds`, and for more no longer than some milliseconds.
    What fails after the first bytes is told by the next call: OSError, ssl.SSLError. 0 is the end.
    """
    functions = _functions()
    connection = _connection(tls) if functions else None
    if functions is None or connection is None:
        return _Gathering(tls, size).receive
    return _Native(functions, tls, connection, seconds, size).receive


class _Native:
    """By tls.c."""

    def __init__(
        self,
        functions: _Functions,
        tls: ssl.SSLSocket,
        connection: int,
        seconds: float,
        size: int,
    ) -> None:
        self._functions = functions
        # Keeps the connection alive, whoever closes the socket meanwhile.
        self._owner = tls._sslobj  # type: ignore[attr-defined]
        self._connection, self._descriptor = connection, tls.fileno()
        self._size, self._seconds = size, seconds
        self._end: _End | None = None

    def receive(self, wanted: memoryview) -> int:
        """Some of `wanted`."""
        size = min(len(wanted), self._size)
        if not size:
            return 0
        memory = (ctypes.c_ubyte * size).from_buffer(wanted)
        end = _End()
        until = time.monotonic() + self._seconds
        count = 0
        while not count:
            if self._end is not None:
                return self._tell(self._end)
            count = self._functions.receive(
                ctypes.byref(self._functions.openssl),
                self._connection,
                self._descriptor,
                memory,
                size,
                int(_GATHER_SECONDS * 1e3),
                max(0, int((until - time.monotonic()) * 1e3)),
                ctypes.byref(end),
            )
            if end.error not in {0, _INTERRUPTED}:
                self._end = end
        return int(count)

    def _tell(self, end: _End) -> int:
        """Raises what Python's ssl would raise; gives 0 where the connection was closed."""
        if end.error == _NOTHING_IN_TIME:
            raise TimeoutError("nothing came in time")
        if end.error == _SSL and end.reason & _REASON_BITS != _UNEXPECTED_END:
            said = self._functions.say(end.reason)
            raise ssl.SSLError(_SSL, said.decode() if said else "unknown error")
        if end.error == _SYSCALL and end.number:
            raise OSError(end.number, "while reading within TLS")
        return 0  # properly or not: the caller knows how much is missing


class _Gathering:
    """By Python's ssl."""

    def __init__(self, tls: ssl.SSLSocket, size: int) -> None:
        self._tls, self._size = tls, size
        self._failure: OSError | None = None

    def receive(self, wanted: memoryview) -> int:
        """Some of `wanted`."""
        if self._failure is not None:
            raise self._failure
        read, size = self._tls.recv_into, min(len(wanted), self._size)
        until = time.monotonic() + _GATHER_SECONDS
        count = 0
        try:
            while count < size:
                got = read(wanted[count:size])
                count += got
                if not got or time.monotonic() > until:
                    break
        except OSError as error:
            if not count:
                raise
            self._failure = error
        return count


@cache
def _functions() -> _Functions | None:
    """None where tls.c was not built, or Python has OpenSSL within itself."""
    try:
        import _ssl

        own = ctypes.CDLL(str(Path(__file__).with_name("_tls.so")))
        openssl = ctypes.CDLL(_ssl.__file__)  # what is looked up is found in what it links to
        names = ("SSL_read", "SSL_get_error", "ERR_clear_error", "ERR_peek_error")
        found = [ctypes.cast(getattr(openssl, name), ctypes.c_void_p) for name in names]
        say = openssl.ERR_reason_error_string
    except (ImportError, OSError, AttributeError):
        return None
    own.tls_receive.restype = ctypes.c_int64
    own.tls_receive.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    )
    say.restype, say.argtypes = ctypes.c_char_p, (ctypes.c_ulong,)
    return _Functions(own.tls_receive, (ctypes.c_void_p * len(found))(*found), say)


def _connection(tls: ssl.SSLSocket) -> int | None:
    """OpenSSL's SSL* of a connection of Python's; None where this Python keeps it elsewhere.

    Python does not give it away. In CPython 3.11 to 3.14 (Modules/_ssl.c, PySSLSocket) it stands
    between two pointers that can be known otherwise: the weak reference to the socket and the
    context. It is taken only from between these two.
    """
    kept = getattr(tls, "_sslobj", None)
    start = object.__basicsize__
    if type(kept).__basicsize__ < start + 3 * ctypes.sizeof(ctypes.c_void_p):
        return None
    socket, connection, context = (ctypes.c_void_p * 3).from_address(id(kept) + start)
    references = [id(reference) for reference in weakref.getweakrefs(tls)]
    known = socket in references and context == id(tls.context)
    return connection if known else None
