"""Is libcurl here, with fetch.c, which receives a range in one call? Else urllib3 does it.

libcurl is the system's (Debian's libcurl4), loaded at run time: no header and no compiler is needed
for it, and its OpenSSL is the one that Python's ssl of the same system uses.
"""

from __future__ import annotations

import ctypes
import os
import ssl
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tensorserve.errors import ConfigurationError
from tensorserve.sources.connection_pools import tls_context

# 7.80: CURLOPT_PREREQFUNCTION. 7.84: curl_global_init is thread-safe.
_LEAST = (7, 84, 0)
_GLOBAL_ALL = 3

Callback = ctypes.CFUNCTYPE(ctypes.c_int)


class Job(ctypes.Structure):
    """job of fetch.c."""

    _fields_ = (
        ("target", ctypes.c_char_p),
        ("headers", ctypes.c_void_p),
        ("content_range", ctypes.c_char_p),
        ("etag", ctypes.c_char_p),
        ("wanted", ctypes.c_int64),
        ("stall", ctypes.c_int64),
        ("connect", ctypes.c_int64),
        ("minimum_rate", ctypes.c_double),
        ("tick", ctypes.c_int64),
        ("head", ctypes.c_void_p),
        ("head_size", ctypes.c_int64),
        ("document", ctypes.c_void_p),
        ("document_size", ctypes.c_int64),
        ("counter", ctypes.c_void_p),
        ("judge", Callback),
        ("next", Callback),
        ("dial", Callback),
        ("ticked", Callback),
        ("take", ctypes.c_void_p),
        ("sink", ctypes.c_void_p),
        ("full", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("room", ctypes.c_int64),
        ("done", ctypes.c_int64),
        ("end", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("status", ctypes.c_int32),
        ("connect_status", ctypes.c_int32),
        ("head_length", ctypes.c_int64),
        ("document_length", ctypes.c_int64),
        ("message", ctypes.c_char * 256),
        ("phase", ctypes.c_int32),
        ("verdict", ctypes.c_int32),
        ("judged", ctypes.c_int32),
        ("finished", ctypes.c_int32),
        ("since", ctypes.c_int64),
        ("window_start", ctypes.c_int64),
        ("window_bytes", ctypes.c_int64),
    )


class Handle(ctypes.Structure):
    """handle of fetch.c."""

    _fields_ = (
        ("c", ctypes.c_void_p),
        ("easy", ctypes.c_void_p),
        ("multi", ctypes.c_void_p),
        ("lists", ctypes.c_void_p * 2),
        ("store", ctypes.c_void_p),
        ("suites", ctypes.c_char_p),
        ("job", ctypes.c_void_p),
        ("broken_off", ctypes.c_int32),
        ("fd", ctypes.c_int32),
        ("moved", ctypes.c_int32),
    )


class Curl(NamedTuple):
    """The functions of fetch.c, and those of libcurl and its OpenSSL that it is given."""

    functions: Any
    """curl of fetch.c."""
    open: Any
    run: Any
    break_off: Any
    close: Any
    header_line: Any
    """(job, line, its length) -> 0 where the answer is not to be read on."""
    new_context: Callable[[], int | None]
    load: Any
    load_default: Any
    store_of: Any
    version: str
    """For people: "libcurl 7.88.1 with OpenSSL 3.0.19"."""


_FUNCTIONS = (
    *("curl_easy_init", "curl_easy_cleanup", "curl_easy_setopt", "curl_easy_getinfo"),
    *("curl_multi_init", "curl_multi_cleanup", "curl_multi_setopt", "curl_multi_add_handle"),
    *("curl_multi_remove_handle", "curl_multi_socket_action", "curl_multi_socket_all"),
    *("curl_multi_poll", "curl_multi_wakeup"),
    *("curl_multi_info_read", "curl_slist_append", "curl_slist_free_all"),
    *("SSL_CTX_set1_cert_store", "SSL_CTX_set_ciphersuites", "SSL_CTX_ctrl"),
)
_loading = threading.Lock()


def curl() -> Curl | None:
    """libcurl; None where it, OpenSSL behind it, or fetch.c is missing."""
    with _loading:
        return _loaded()


@cache
def _loaded() -> Curl | None:
    try:
        own = ctypes.CDLL(str(Path(__file__).with_name("_fetch.so")))
        # Not libcurl-gnutls: certificates are checked by OpenSSL, as Python's ssl does.
        library = ctypes.CDLL("libcurl.so.4")
        found = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _FUNCTIONS]
        new, method = library.SSL_CTX_new, library.TLS_client_method
        load, default = (
            library.SSL_CTX_load_verify_locations,
            library.SSL_CTX_set_default_verify_paths,
        )
        store_of = library.SSL_CTX_get_cert_store
    except (OSError, AttributeError):
        return None
    library.curl_version.restype = ctypes.c_char_p
    version = library.curl_version().decode()
    if not _usable(version):
        return None
    if own.fetch_job_bytes() != ctypes.sizeof(Job) or own.fetch_handle_bytes() != ctypes.sizeof(
        Handle
    ):
        return None
    if library.curl_global_init(ctypes.c_long(_GLOBAL_ALL)):
        return None
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    own.fetch_open.argtypes = (
        *(pointer, pointer, text, pointer, text, ctypes.c_int, ctypes.c_int, pointer, pointer),
        *(text, ctypes.c_int64),
    )
    own.fetch_run.argtypes, own.fetch_run.restype = (pointer, pointer), None
    own.fetch_break_off.argtypes, own.fetch_break_off.restype = (pointer,), None
    own.fetch_close.argtypes, own.fetch_close.restype = (pointer,), None
    own.fetch_header_line.argtypes = (pointer, text, ctypes.c_int64)
    method.restype = new.restype = store_of.restype = pointer
    new.argtypes = store_of.argtypes = default.argtypes = (pointer,)
    load.argtypes = (pointer, text, text)
    return Curl(
        (pointer * len(found))(*found),
        own.fetch_open,
        own.fetch_run,
        own.fetch_break_off,
        own.fetch_close,
        own.fetch_header_line,
        lambda: new(method()),
        load,
        default,
        store_of,
        " with ".join(part.replace("/", " ") for part in version.split()[:2]),
    )


def _usable(version: str) -> bool:
    """Whether `version`, as in "libcurl/7.88.1 OpenSSL/3.0.19 ...", is new enough, with OpenSSL."""
    first, _, rest = version.partition(" ")
    numbers = first.rpartition("/")[2].partition("-")[0].split(".")
    if not all(number.isdecimal() for number in numbers):
        return False
    return tuple(map(int, numbers)) >= _LEAST and "OpenSSL/3" in rest


@cache
def cipher_suites() -> bytes:
    """Those of TLS 1.3 that OpenSSL's configuration allows, AES-128 first, as browsers have it: it
    takes less time than AES-256, and servers that leave the choice to the client take the first.
    """
    names = [cipher["name"] for cipher in ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).get_ciphers()]
    found = [name for name in names if name.startswith("TLS_")]
    return ":".join(sorted(found, key=lambda name: "AES_128_GCM" not in name)).encode()


def trusted(ca_bundle: str | None) -> int:
    """OpenSSL's X509_STORE of `ca_bundle`, by default of what Python's ssl trusts by default.

    Raises ConfigurationError where `ca_bundle` cannot be read. Requires `curl()`.
    """
    if ca_bundle is None:
        paths = ssl.get_default_verify_paths()
        names = (paths.openssl_cafile_env, paths.openssl_capath_env)
        return _store(None, tuple(os.environ.get(name) for name in names))
    tls_context(ca_bundle)  # says what is wrong with it
    return _store(ca_bundle, (str(Path(ca_bundle).stat().st_mtime_ns),))


@lru_cache(maxsize=16)
def _store(ca_bundle: str | None, _changed: tuple[str | None, ...]) -> int:
    found = curl()
    assert found is not None
    context = found.new_context()
    if context is None:
        raise MemoryError("OpenSSL gives no context")
    if ca_bundle is None:
        found.load_default(context)  # as Python's ssl: what is missing is not trusted
    elif not found.load(context, os.fsencode(ca_bundle), None):
        raise ConfigurationError(f"The CA bundle {ca_bundle} cannot be used.")
    store = found.store_of(context)
    assert isinstance(store, int)
    return store  # the context, which owns it, lives as long as the process
