"""Do the accepted ways of writing a key or passphrase give the right 32 bytes, and no others?"""

from __future__ import annotations

import base64
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from tensorizer import EncryptionParams

from tensorserve.bundle import keys as keys_module
from tensorserve.bundle.keys import MAX_DERIVATIONS, GivenKey, parse_key, parse_passphrase
from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.format import PasswordHash, TensorHeader, TensorRecord, derive_key
from tensorserve.secret import Secret

KEY = bytes(range(200, 232))
ORIGIN = "TENSORSERVE_KEY_FILE=/run/secrets/k"


def _header(derivation: PasswordHash | None) -> TensorHeader:
    record = TensorRecord("w", 0, "uint8", (1,), 0, 60, 1, "|u1", b"w", False, False)
    return TensorHeader(record, "s3://b/m.tensors", (), b"", None, derivation)


@pytest.mark.parametrize(
    "written",
    [
        KEY,
        KEY.hex().encode(),
        KEY.hex().upper().encode() + b"\n",
        b"\xef\xbb\xbf" + KEY.hex().encode() + b"\r\n",
        base64.b64encode(KEY),
        base64.b64encode(KEY) + b"\r\n",
        base64.b64encode(KEY).rstrip(b"="),
        base64.urlsafe_b64encode(KEY),
        b"  " + base64.urlsafe_b64encode(KEY).rstrip(b"=") + b" ",
    ],
    ids=[
        "raw",
        "hex",
        "HEX line",
        "mark",
        "base64",
        "base64 line",
        "unpadded",
        "urlsafe",
        "spaces",
    ],
)
def test_a_key_is_accepted_raw_or_as_hex_or_base64(written: bytes) -> None:
    """All of them are the same key, for any file."""
    key = parse_key(Secret(written, ORIGIN))

    assert key.for_header(_header(None)) == KEY
    assert key.origin == ORIGIN


def test_a_raw_key_may_begin_and_end_with_white_space_bytes() -> None:
    """32 bytes are the key as they stand; random bytes may be line feeds."""
    raw = b"\n" + bytes(range(30)) + b"\n"

    assert parse_key(Secret(raw)).for_header(_header(None)) == raw


@pytest.mark.parametrize(
    "written",
    [
        b"",
        KEY[:31],
        KEY + b"\n",
        KEY[:31].hex().encode(),
        (KEY + b"x").hex().encode(),
        base64.b64encode(KEY[:31]),
        b"correct horse battery staple",
        b"g" * 64,
        b"=" * 44,
    ],
)
def test_anything_else_is_refused_without_showing_it(written: bytes) -> None:
    """The message says where it came from and how long it was, never what it was."""
    with pytest.raises(ConfigurationError, match=ORIGIN) as caught:
        parse_key(Secret(written, ORIGIN))

    assert f"{len(written)} bytes" in caught.value.message
    if written:
        assert repr(written)[2:-1] not in str(caught.value)


def test_a_key_of_another_length_cannot_be_made() -> None:
    """Providers hand over bytes; only 32 of them are a key."""
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        GivenKey(KEY[:31], ORIGIN)


def test_a_passphrase_gives_tensorizers_key() -> None:
    """The file's own parameters are used, and the line ending of an editor is not part of it."""
    theirs = EncryptionParams.from_string("wörter", opslimit=2, memlimit=16384, salt=b"0" * 16)
    passphrase = parse_passphrase(Secret("wörter\n", ORIGIN))

    key = passphrase.for_header(_header(PasswordHash(2, 16384, b"0" * 16)))

    assert key == theirs.key


def test_a_passphrase_keeps_its_inner_white_space() -> None:
    """Only line endings at the end are dropped."""
    derivation = PasswordHash(1, 8192, b"0" * 16)

    key = parse_passphrase(Secret(b" a\nb \r\n")).for_header(_header(derivation))

    assert key == derive_key(b" a\nb ", salt=b"0" * 16, passes=1, memory=8192)


@pytest.mark.parametrize("written", [b"", b"\n", b"\r\n"])
def test_an_empty_passphrase_is_refused(written: bytes) -> None:
    """A file that was never written must not seal or open anything."""
    with pytest.raises(ConfigurationError, match=f"{ORIGIN} is empty"):
        parse_passphrase(Secret(written, ORIGIN))


def test_a_key_is_derived_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A derivation takes seconds and a gigabyte; every tensor's header asks for the same one."""
    calls = []

    def counting(passphrase: bytes, **parameters: object) -> bytes:
        calls.append(parameters)
        return derive_key(passphrase, **parameters)  # type: ignore[arg-type]

    monkeypatch.setattr(keys_module, "derive_key", counting)
    passphrase = parse_passphrase(Secret("x"))
    header = _header(PasswordHash(1, 8192, bytes(16)))

    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(passphrase.for_header, [header] * 32))

    assert (len(keys), len(calls)) == (1, 1)


def test_a_file_cannot_ask_for_derivation_after_derivation() -> None:
    """A forged file with a salt for each tensor is stopped."""
    passphrase = parse_passphrase(Secret("x"))
    headers = [
        _header(PasswordHash(1, 8192, i.to_bytes(16, "little"))) for i in range(MAX_DERIVATIONS + 1)
    ]
    for header in headers[:-1]:
        passphrase.for_header(header)

    with pytest.raises(CorruptError, match=r"s3://b/m\.tensors asks for more than 64"):
        passphrase.for_header(headers[-1])
    assert passphrase.for_header(headers[0])


def test_a_derivation_out_of_bounds_names_the_file() -> None:
    """The reader sees which file asks for it, and what to do if that is meant."""
    with pytest.raises(CorruptError, match=r"s3://b/m\.tensors asks .* out of bounds") as caught:
        parse_passphrase(Secret("x")).for_header(_header(PasswordHash(1, 2**40, bytes(16))))

    assert "TENSORSERVE_KEY_FILE" in (caught.value.hint or "")


def test_a_passphrase_for_a_file_sealed_with_a_key_is_told() -> None:
    """Nothing can be derived; the message says which of the two is needed."""
    with pytest.raises(WrongKeyError, match="sealed with a key, not a passphrase"):
        parse_passphrase(Secret("x")).for_header(_header(None))


@pytest.mark.parametrize("make", [parse_key, parse_passphrase])
def test_neither_shows_nor_pickles_its_secret(make: type) -> None:
    """Not in a log, not in a traceback, not on its way to another process."""
    secret = make(Secret(b"canary-canary-canary-canary-32by", ORIGIN))

    assert "canary" not in repr(secret) + str(secret)
    for duplicate in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not picklable"):
            duplicate(secret)
