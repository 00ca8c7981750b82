"""A sealed cache: what its keys are made of, and that no changed byte of it is believed."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sealed_caches import FINGERPRINT, KEY, opened, sealed_archive, sealed_files
from tensorserve.bundle.compiled import (
    CHUNK_BYTES,
    MAGIC,
    MAX_SEALED_BYTES,
    Contents,
    SealedCache,
    name_of,
    seal,
)
from tensorserve.bundle.keys import GivenKey, parse_passphrase
from tensorserve.crypto.ed25519 import SigningKey, VerifyingKey
from tensorserve.crypto.hkdf import hkdf_sha256
from tensorserve.crypto.secretbox import nonce_at, open_chunk
from tensorserve.errors import CorruptError, WrongKeyError
from tensorserve.format import PasswordHash
from tensorserve.secret import Secret

OTHER = GivenKey(bytes(range(1, 33)), "another model")
TAG, MAC, SIGNATURE = 16, 32, 64
THREE_CHUNKS = os.urandom(2 * CHUNK_BYTES + 77)


def of_three_chunks(**options: object) -> bytes:
    contents = Contents(len(THREE_CHUNKS), 0, 0)
    return sealed_archive(THREE_CHUNKS, contents, **options)  # type: ignore[arg-type]


def archive(sealed: bytes, **options: object) -> bytes:
    """The archive in `sealed`."""
    options = {"fingerprint": FINGERPRINT, "key": KEY} | options
    file = io.BytesIO(sealed)
    cache = SealedCache.authenticate(file, len(sealed), "the cache", **options)  # type: ignore[arg-type]
    return b"".join(cache.chunks())


def header_of(sealed: bytes) -> bytes:
    start = len(MAGIC) + 4
    return sealed[start : start + int.from_bytes(sealed[len(MAGIC) : start], "little")]


def body_of(sealed: bytes) -> int:
    """Where the boxes begin in an unsigned file."""
    return len(MAGIC) + 4 + len(header_of(sealed)) + MAC


def with_header(sealed: bytes, **changes: object) -> bytes:
    """With another header, as somebody can write it who has no key."""
    document = json.loads(header_of(sealed)) | changes
    header = json.dumps(document, separators=(",", ":")).encode()
    rest = sealed[len(MAGIC) + 4 + len(header_of(sealed)) :]
    return MAGIC + len(header).to_bytes(4, "little") + header + rest


def test_what_was_sealed_is_opened(tmp_path: Path) -> None:
    """Under its name in the bundle."""
    files = {"vllm/a/b.py": b"code", "triton/empty": b"", "large": os.urandom(3 * CHUNK_BYTES)}
    opened(sealed_files(files, tmp_path / "made"), tmp_path / "found")
    found = {
        path.relative_to(tmp_path / "found").as_posix(): path.read_bytes()
        for path in (tmp_path / "found").rglob("*")
        if path.is_file()
    }
    assert found == files
    assert name_of(FINGERPRINT) == f"compiled/{FINGERPRINT}.sealed"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_archives_of_every_size(size: int) -> None:
    """Around the end of a chunk."""
    data = os.urandom(size)
    assert archive(sealed_archive(data, Contents(size, 0, 0))) == data


def test_the_file_is_as_the_documentation_says() -> None:
    """Opened here by other means: two keys of HKDF, a MAC over the header, a digest of the rest."""
    sealed = of_three_chunks()
    header = header_of(sealed)
    document = json.loads(header)
    salt = bytes.fromhex(document["authentication"]["salt"])
    made = {
        use: hkdf_sha256(KEY.reveal(), salt=salt, info=f"tensorserve compiled v1 {use}".encode())
        for use in ("mac", "data")
    }
    start = body_of(sealed)
    mac = hmac.new(made["mac"], b"|TSCC|\r\n" + header, hashlib.sha256).digest()
    assert sealed[start - MAC : start] == mac
    assert document["sha256"] == hashlib.sha256(sealed[start:]).hexdigest()
    found = bytearray()
    for number in range(3):
        box = bytearray(sealed[start + number * (CHUNK_BYTES + TAG) :][: CHUNK_BYTES + TAG])
        nonce = nonce_at(bytes.fromhex(document["nonce"]), number)
        with memoryview(box) as view:
            open_chunk(made["data"], nonce, view[:TAG], view[TAG:], view[TAG:])
            found += view[TAG:]
    assert bytes(found) == THREE_CHUNKS
    assert THREE_CHUNKS[:64] not in sealed


def test_no_two_files_share_a_key() -> None:
    """The salt is new for each, so a chunk of one file opens in no other."""
    one, other = (json.loads(header_of(of_three_chunks())) for _ in range(2))
    assert one["authentication"]["salt"] != other["authentication"]["salt"]
    assert one["nonce"] != other["nonce"]


def test_a_flipped_bit_anywhere_is_found() -> None:
    """In each byte before the boxes, and at places in the boxes."""
    sealed = of_three_chunks()
    start = body_of(sealed)
    places = [*range(start), start, start + TAG, start + CHUNK_BYTES + TAG, len(sealed) - 1]
    for place in places:
        changed = bytearray(sealed)
        changed[place] ^= 4
        with pytest.raises(CorruptError, match="is not believed"):
            archive(bytes(changed))


def test_cut_off_or_longer_files_are_found() -> None:
    """At a chunk's end as anywhere else."""
    sealed = of_three_chunks()
    box = CHUNK_BYTES + TAG
    for cut in (0, 5, len(MAGIC) + 2, body_of(sealed), body_of(sealed) + box, len(sealed) - 1):
        with pytest.raises(CorruptError, match="is not believed"):
            archive(sealed[:cut])
    with pytest.raises(CorruptError, match="bytes after its header"):
        archive(sealed + b"\0")


def test_reordered_chunks_are_found() -> None:
    """Whole boxes, of one size, that change places."""
    sealed, box = of_three_chunks(), CHUNK_BYTES + TAG
    start = body_of(sealed)
    one, two = sealed[start : start + box], sealed[start + box : start + 2 * box]
    with pytest.raises(CorruptError, match="SHA-256"):
        archive(sealed[:start] + two + one + sealed[start + 2 * box :])


def test_chunks_are_opened_at_their_place_only() -> None:
    """The tags find an exchange by themselves, as when the file is exchanged between two reads."""
    sealed, box = of_three_chunks(), CHUNK_BYTES + TAG
    start = body_of(sealed)
    file = io.BytesIO(sealed)
    cache = SealedCache.authenticate(
        file, len(sealed), "the cache", fingerprint=FINGERPRINT, key=KEY
    )
    one, two = sealed[start : start + box], sealed[start + box : start + 2 * box]
    file.seek(start)
    file.write(two + one)
    with pytest.raises(CorruptError, match="chunk 0 fails authentication"):
        list(cache.chunks())
    file.seek(start)
    file.write(one + two)
    file.truncate(start + box + 5)
    with pytest.raises(CorruptError, match="chunk 1 fails authentication"):
        list(cache.chunks())


def test_another_models_key_opens_nothing() -> None:
    """Nor does one that is derived from the right key for the manifest."""
    with pytest.raises(CorruptError, match="MAC does not fit the key from another model"):
        archive(of_three_chunks(), key=OTHER)


def test_a_file_under_another_name_is_refused() -> None:
    """An old cache that was renamed to what a newer engine asks for."""
    with pytest.raises(CorruptError, match="renamed"):
        archive(of_three_chunks(), fingerprint="ab" * 32)


def test_a_header_without_the_key_is_refused() -> None:
    """Whatever it says: another fingerprint, no signature, another version, other sizes."""
    sealed = of_three_chunks()
    for changes in (
        {"fingerprint": "ab" * 32},
        {"signed": True},
        {"version": 2},
        {"archive_bytes": MAX_SEALED_BYTES},
        {"files": 1},
        {"extra": None},
    ):
        with pytest.raises(CorruptError, match="MAC does not fit"):
            archive(with_header(sealed, **changes))


def test_malformed_headers_are_refused() -> None:
    """Before a key is derived for them."""
    sealed = of_three_chunks()
    rest = bytes(200)
    for front in (
        b"",
        b"<!DOCTYPE html>",
        MAGIC,
        MAGIC + b"\0\0",
        MAGIC + (0).to_bytes(4, "little") + rest,
        MAGIC + (5000).to_bytes(4, "little") + b" " * 5000,
        MAGIC + (2).to_bytes(4, "little") + b"{}" + rest,
        MAGIC + (2).to_bytes(4, "little") + b"[]" + rest,
        MAGIC + (3).to_bytes(4, "little") + b"\xff\xfe\x00" + rest,
        with_header(sealed, format="tensorserve-bundle"),
        with_header(sealed, authentication=None),
        with_header(sealed, authentication={"scheme": "none"}),
    ):
        with pytest.raises(CorruptError, match="is not believed"):
            archive(front)


def test_limits_hold_for_the_keys_owner_too() -> None:
    """A size beyond what a start would take is refused before anything is read."""
    for contents in (
        Contents(0, 100_001, 0),
        Contents(0, 0, 16 * 1024**3 + 1),
    ):
        with pytest.raises(CorruptError, match="is not a whole number from 0 to"):
            archive(sealed_archive(b"", contents))


def test_an_archive_of_another_size_is_not_sealed() -> None:
    """It would be cut off, or have a wrong header."""
    for size in (3, 5):
        with pytest.raises(ValueError, match="not of the size"):
            seal(
                io.BytesIO(b"four"), io.BytesIO(), Contents(size, 0, 0),
                fingerprint=FINGERPRINT, key=KEY, derivation=None, signing_key=None,
            )  # fmt: skip


class TestSigned:
    """A key that only the job has: who can open a cache cannot make one."""

    @pytest.fixture
    def private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.generate()

    def test_it_is_accepted_with_and_without_being_asked_for(
        self, private: Ed25519PrivateKey
    ) -> None:
        sealed = of_three_chunks(signing_key=SigningKey(private))
        assert archive(sealed) == THREE_CHUNKS
        public = VerifyingKey(private.public_key(), "sign.pub")
        assert archive(sealed, verifying_key=public) == THREE_CHUNKS

    def test_an_unsigned_one_is_refused(self, private: Ed25519PrivateKey) -> None:
        public = VerifyingKey(private.public_key(), "sign.pub")
        with pytest.raises(CorruptError, match=r"not signed, and sign\.pub asks"):
            archive(of_three_chunks(), verifying_key=public)

    def test_another_keys_signature_is_refused(self, private: Ed25519PrivateKey) -> None:
        forged = of_three_chunks(signing_key=SigningKey(Ed25519PrivateKey.generate()))
        public = VerifyingKey(private.public_key(), "sign.pub")
        with pytest.raises(CorruptError, match=r"signature is not of the key from sign\.pub"):
            archive(forged, verifying_key=public)

    def test_a_signature_of_another_file_is_refused(self, private: Ed25519PrivateKey) -> None:
        """Its header is another one, as are salt and digest."""
        one, other = (of_three_chunks(signing_key=SigningKey(private)) for _ in range(2))
        at = body_of(one)
        mixed = one[:at] + other[at : at + SIGNATURE] + one[at + SIGNATURE :]
        public = VerifyingKey(private.public_key(), "sign.pub")
        with pytest.raises(CorruptError, match="signature is not of the key"):
            archive(mixed, verifying_key=public)


class TestPassphrase:
    """The key of a model that is sealed with a passphrase."""

    CHEAP = PasswordHash(passes=1, memory=8192, salt=bytes(16))

    def test_it_opens_what_it_sealed(self) -> None:
        passphrase = parse_passphrase(Secret(b"correct horse", "the test"))
        out = io.BytesIO()
        seal(
            io.BytesIO(b"four"), out, Contents(4, 0, 0), fingerprint=FINGERPRINT, key=passphrase,
            derivation=self.CHEAP, signing_key=None,
        )  # fmt: skip
        assert archive(out.getvalue(), key=passphrase) == b"four"
        other = parse_passphrase(Secret(b"wrong horse", "the test"))
        with pytest.raises(CorruptError, match="MAC does not fit"):
            archive(out.getvalue(), key=other)

    def test_one_that_a_key_sealed_is_not_opened(self) -> None:
        with pytest.raises(WrongKeyError, match="sealed with a key"):
            archive(of_three_chunks(), key=parse_passphrase(Secret(b"x", "the test")))
