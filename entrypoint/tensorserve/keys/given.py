"""How does a key or passphrase that the user gave become the 32 bytes that open a file?"""

from __future__ import annotations

import base64
import binascii
import threading
from typing import NoReturn, Protocol

from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.format.box import KEY_SIZE
from tensorserve.format.crypto import derive_key
from tensorserve.format.header import FileKey, PasswordHash, TensorHeader
from tensorserve.secret import REDACTED, Secret

# tensorizer derives once a file, and a bundle has a few files; a forged file could have a salt for
# each of its tensors.
MAX_DERIVATIONS = 64


class ModelKey(FileKey, Protocol):
    """A key that also opens what no tensor's header is at hand for: a manifest."""

    def for_parameters(self, parameters: PasswordHash | None, asked_by: str) -> bytes: ...


class GivenKey:
    """A 32-byte key, the same for every file."""

    def __init__(self, key: bytes, origin: str) -> None:
        """``origin`` says where the key came from, for messages. ValueError for other lengths."""
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes, not {len(key)}")
        self._key = Secret(key, origin)

    @property
    def origin(self) -> str:
        """Where the key came from; never the key."""
        return self._key.origin

    def reveal(self) -> bytes:
        """The 32 bytes, for sealing with."""
        return self._key.reveal()

    def for_header(self, header: TensorHeader) -> bytes:
        """The key itself: a derived key, given as such, opens a passphrase's file too."""
        return self.for_parameters(header.key_derivation, header.source_name)

    def for_parameters(
        self,
        parameters: PasswordHash | None,  # noqa: ARG002 - ModelKey's interface
        asked_by: str,  # noqa: ARG002
    ) -> bytes:
        """The key itself."""
        return self._key.reveal()

    def __repr__(self) -> str:
        return f"GivenKey({REDACTED}, origin={self.origin!r})"


class Passphrase:
    """A passphrase; each file says how its key is derived from it. Thread-safe."""

    def __init__(self, passphrase: Secret) -> None:
        self._passphrase = passphrase
        self._derived: dict[PasswordHash, Secret] = {}
        # Held while deriving: two threads must not spend the memory twice.
        self._lock = threading.Lock()

    @property
    def origin(self) -> str:
        """Where the passphrase came from; never the passphrase."""
        return self._passphrase.origin

    def for_header(self, header: TensorHeader) -> bytes:
        """The key of the file that ``header`` is from, derived once for equal parameters.

        Raises WrongKeyError if the file was sealed with a key instead, CorruptError if its
        parameters are out of bounds, ConfigurationError if the memory for them is lacking.
        """
        return self.for_parameters(header.key_derivation, header.source_name)

    def for_parameters(self, parameters: PasswordHash | None, asked_by: str) -> bytes:
        """The key that `parameters` make, for what `asked_by` names. Raises as `for_header`."""
        if parameters is None:
            raise WrongKeyError(
                f"{asked_by} was sealed with a key, not a passphrase; "
                f"the passphrase from {self.origin} cannot open it.",
                hint="Set TENSORSERVE_KEY_FILE to the key's file instead.",
            )
        with self._lock:
            if parameters not in self._derived:
                if len(self._derived) >= MAX_DERIVATIONS:
                    raise CorruptError(
                        f"{asked_by} asks for more than {MAX_DERIVATIONS} key derivations.",
                        hint="tensorizer needs one a file: the file is damaged or forged.",
                    )
                key = derive_key(
                    self._passphrase.reveal(),
                    salt=parameters.salt,
                    passes=parameters.passes,
                    memory=parameters.memory,
                    asked_by=asked_by,
                )
                self._derived[parameters] = Secret(key, self.origin)
            return self._derived[parameters].reveal()

    def __repr__(self) -> str:
        return f"Passphrase({REDACTED}, origin={self.origin!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a passphrase is not picklable: hand it over with tensorserve.handoff")


def parse_key(given: Secret) -> GivenKey:
    """The key in ``given``: 32 bytes as they are, or as hex or base64 text (padding optional).

    White space around text is ignored. Raises ConfigurationError, saying what was found but
    never the value, for anything else.
    """
    value = given.reveal()
    if len(value) == KEY_SIZE:
        return GivenKey(value, given.origin)
    text = value.strip()
    for decode in (_from_hex, _from_base64):
        key = decode(text)
        if key is not None and len(key) == KEY_SIZE:
            return GivenKey(key, given.origin)
    raise ConfigurationError(
        f"The key from {given.origin or 'the settings'} is not a 32-byte key: its {len(value)} "
        "bytes are neither 32 raw bytes nor 64 hex digits nor base64 of 32 bytes.",
        hint="Make one with `openssl rand -hex 32`. If it is a passphrase, "
        "set TENSORSERVE_PASSPHRASE_FILE instead.",
    )


def parse_passphrase(given: Secret) -> Passphrase:
    """The passphrase in ``given``, without the line ending that editors put after it.

    Raises ConfigurationError if nothing is left.
    """
    value = given.reveal().rstrip(b"\r\n")
    if not value:
        raise ConfigurationError(
            f"The passphrase from {given.origin or 'the settings'} is empty.",
            hint="Write the passphrase that the file was sealed with into it.",
        )
    return Passphrase(Secret(value, given.origin))


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
