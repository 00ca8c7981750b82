"""How is a sealed cache of compiled code written, authenticated and opened?

One file, `compiled/<fingerprint>.sealed`, beside the manifest. HKDF-SHA256 with the file's salt
derives two keys from the model's key (or from TENSORSERVE_COMPILED_KEY): one for HMAC-SHA256 over
the header, which has the SHA-256 of all that follows it, and one for the XSalsa20-Poly1305 boxes
with the archive. See docs/bundle-format.md.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from tensorserve.bounded_json import read_json
from tensorserve.bundle.json_fields import JsonFields
from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.manifest_mac import MAC_BYTES, Parameters
from tensorserve.crypto.backends import NONCE_SIZE, TAG_SIZE
from tensorserve.crypto.ed25519 import SIGNATURE_SIZE, SigningKey, VerifyingKey
from tensorserve.crypto.hkdf import hkdf_sha256
from tensorserve.crypto.secretbox import TagMismatchError
from tensorserve.errors import CorruptError
from tensorserve.format import PasswordHash, nonce_at, open_chunk, seal_chunk

FOLDER = "compiled"
SUFFIX = ".sealed"
FORMAT = "tensorserve-compiled"
VERSION = 1
MAGIC = b"|TSCC|\r\n"  # the line break shows a transfer that converted text
CHUNK_BYTES = 1024**2
# A cache of kernels for GPUs takes some hundreds of megabytes.
MAX_SEALED_BYTES = 4 * 1024**3
MAX_FILES_BYTES = 16 * 1024**3
MAX_FILES = 100_000
_MAX_HEADER_BYTES = 4096
_MAC_INFO = b"tensorserve compiled v1 mac"
_DATA_INFO = b"tensorserve compiled v1 data"
# A signature of another kind of document, made with the same key, is none of this one.
_SIGNED = b"tensorserve compiled v1 signature\0"
_LENGTH = struct.Struct("<I")
_NAME = re.compile(rf"{FOLDER}/([0-9a-f]{{64}}){re.escape(SUFFIX)}")
_BOX_BYTES = CHUNK_BYTES + TAG_SIZE
_HINT = (
    "Somebody without the key changed it, or it was damaged, or it is another key's. Delete it and "
    "run `tensorserve precompile` again, and check who can write to this storage."
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in an archive."""

    archive_bytes: int
    """Of the compressed archive."""
    files: int
    files_bytes: int
    """Of all files together, unpacked."""
    signed: bool = False


def name_of(fingerprint: str) -> str:
    """The file's name in the bundle."""
    return f"{FOLDER}/{fingerprint}{SUFFIX}"


def fingerprint_in(name: str) -> str | None:
    """The fingerprint in the name of a sealed cache; None if `name` is that of another file."""
    found = _NAME.fullmatch(name)
    return found[1] if found else None


def seal(
    archive: BinaryIO,
    out: BinaryIO,
    contents: Contents,
    *,
    fingerprint: str,
    key: ModelKey,
    derivation: PasswordHash | None,
    signing_key: SigningKey | None,
) -> None:
    """Writes the sealed file with `archive` (of `contents.archive_bytes`) to `out`, a new file.

    `fingerprint` is 64 hex digits. `derivation` has the parameters that derive `key` from a
    passphrase: those of the manifest, so that a start derives the key once.
    """
    parameters = Parameters.fresh(derivation)
    mac_key, data_key = _keys(key, parameters, FORMAT)
    nonce = os.urandom(NONCE_SIZE)
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "authentication": parameters.to_json(),
        "nonce": nonce.hex(),
        "archive_bytes": contents.archive_bytes,
        "files": contents.files,
        "files_bytes": contents.files_bytes,
        "signed": signing_key is not None,
        "sha256": "0" * 64,
    }
    placeholder = _document_bytes(document)
    front = len(MAGIC) + _LENGTH.size + len(placeholder) + MAC_BYTES
    out.seek(front + (SIGNATURE_SIZE if signing_key is not None else 0))
    digest, left = hashlib.sha256(), contents.archive_bytes
    for number in range(_chunks(contents.archive_bytes)):
        chunk = bytearray(archive.read(min(CHUNK_BYTES, left)))
        left -= len(chunk)
        with memoryview(chunk) as view:
            tag = seal_chunk(data_key, nonce_at(nonce, number), view, view)
        for part in (tag, chunk):
            digest.update(part)
            out.write(part)
    if left or archive.read(1):
        raise ValueError("the archive is not of the size that was given")
    header = _document_bytes(document | {"sha256": digest.hexdigest()})
    assert len(header) == len(placeholder)
    out.seek(0)
    out.write(MAGIC + _LENGTH.pack(len(header)) + header)
    out.write(_mac(mac_key, header))
    if signing_key is not None:
        out.write(signing_key.sign(_SIGNED + header))


@dataclass(frozen=True)
class SealedCache:
    """A sealed file that is authentic as a whole; nothing of it was opened yet."""

    contents: Contents
    _file: BinaryIO
    _name: str
    _key: bytes
    _nonce: bytes
    _start: int

    @classmethod
    def authenticate(
        cls,
        file: BinaryIO,
        size: int,
        name: str,
        *,
        fingerprint: str,
        key: ModelKey,
        verifying_key: VerifyingKey | None = None,
    ) -> SealedCache:
        """Reads all `size` bytes of `file` and authenticates them. `name` names it in errors.

        With a `verifying_key`, there must be a signature of its private key. Raises CorruptError
        unless it is the file that the key's owner sealed for `fingerprint`, and the key's errors.
        """
        try:
            header, parameters = _read_front(file)
            mac_key, data_key = _keys(key, parameters, name)
            mac = file.read(MAC_BYTES)
            if not hmac.compare_digest(mac, _mac(mac_key, header)):
                raise ValueError(
                    f"its MAC does not fit the key from {key.origin or 'the settings'}"
                )
            fields = JsonFields(read_json(header, strict=True), "its header")
            if fields.natural("version") != VERSION:
                raise ValueError(f"it is of version {fields.natural('version')}, not {VERSION}")
            if fields.digest("fingerprint") != fingerprint:
                raise ValueError(
                    "it was sealed for another fingerprint and renamed: "
                    f"{fields.digest('fingerprint')}"
                )
            signed = fields.get("signed") is True
            signature = file.read(SIGNATURE_SIZE) if signed else b""
            if verifying_key is not None:
                _check_signature(verifying_key, signature, header)
            contents = Contents(
                fields.natural("archive_bytes", MAX_SEALED_BYTES),
                fields.natural("files", MAX_FILES),
                fields.natural("files_bytes", MAX_FILES_BYTES),
                signed,
            )
            start = file.tell()
            _check_body(file, size - start, contents, fields.digest("sha256"))
            nonce = bytes.fromhex(fields.text("nonce"))
            if len(nonce) != NONCE_SIZE:
                raise ValueError("its nonce is not of 24 bytes")
        except ValueError as error:
            raise CorruptError(f"{name} is not believed: {error}.", hint=_HINT) from error
        return cls(contents, file, name, data_key, nonce, start)

    def chunks(self) -> Iterator[bytes]:
        """The archive, decrypted piece by piece. Raises CorruptError: the file is read again."""
        self._file.seek(self._start)
        left = self.contents.archive_bytes
        for number in range(_chunks(left)):
            box = bytearray(self._file.read(TAG_SIZE + min(CHUNK_BYTES, left)))
            left -= CHUNK_BYTES
            with memoryview(box) as view:
                data = view[TAG_SIZE:]
                try:
                    open_chunk(
                        self._key, nonce_at(self._nonce, number), view[:TAG_SIZE], data, data
                    )
                except (TagMismatchError, ValueError) as error:
                    raise CorruptError(
                        f"{self._name}: chunk {number} fails authentication.", hint=_HINT
                    ) from error
                opened = bytes(data)
                data.release()
            yield opened


def _read_front(file: BinaryIO) -> tuple[bytes, Parameters]:
    """The header, which nothing has authenticated yet, and how its keys are derived."""
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin as a sealed cache does")
    raw = file.read(_LENGTH.size)
    length = _LENGTH.unpack(raw)[0] if len(raw) == _LENGTH.size else 0
    if not 0 < length <= _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes")
    header = file.read(length)
    fields = JsonFields(read_json(header, strict=True), "its header")
    if fields.text("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    return header, Parameters.from_json(fields.get("authentication"))


def _check_signature(verifying_key: VerifyingKey, signature: bytes, header: bytes) -> None:
    if not signature:
        raise ValueError(f"it is not signed, and {verifying_key.origin} asks for a signature")
    if not verifying_key.verifies(signature, _SIGNED + header):
        raise ValueError(f"its signature is not of the key from {verifying_key.origin}")


def _check_body(file: BinaryIO, size: int, contents: Contents, sha256: str) -> None:
    expected = contents.archive_bytes + TAG_SIZE * _chunks(contents.archive_bytes)
    if size != expected:
        raise ValueError(f"it has {size} bytes after its header instead of {expected}")
    digest = hashlib.sha256()
    while block := file.read(_BOX_BYTES):
        digest.update(block)
    if not hmac.compare_digest(digest.hexdigest(), sha256):
        raise ValueError("its SHA-256 is not the one in its header")


def _keys(key: ModelKey, parameters: Parameters, asked_by: str) -> tuple[bytes, bytes]:
    """(for the MAC, for the boxes)."""
    secret = key.for_parameters(parameters.derivation, asked_by)
    return (
        hkdf_sha256(secret, salt=parameters.salt, info=_MAC_INFO),
        hkdf_sha256(secret, salt=parameters.salt, info=_DATA_INFO),
    )


def _mac(key: bytes, header: bytes) -> bytes:
    return hmac.digest(key, MAGIC + header, hashlib.sha256)


def _chunks(size: int) -> int:
    return -(-size // CHUNK_BYTES)


def _document_bytes(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
