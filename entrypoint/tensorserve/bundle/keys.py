"""How does the user's key or passphrase become the 32-byte key of a file?"""

from __future__ import annotations

import threading
from typing import NoReturn, Protocol

from tensorserve.crypto.backends import KEY_SIZE
from tensorserve.crypto.key_text import key_bytes
from tensorserve.crypto.secretbox import derive_key
from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.format.header import FileKey, PasswordHash, TensorHeader
from tensorserve.secret import REDACTED, Secret

# tensorizer uses one salt for a file, and a bundle has a few files. A forged file could have a salt
# for each tensor, and each derivation takes seconds and hundreds of megabytes.
MAX_DERIVATIONS = 64


class ModelKey(FileKey, Protocol):
    """A file key that can also be derived without a tensor header, for a manifest."""

    def for_parameters(self, parameters: PasswordHash | None, asked_by: str) -> bytes:
        """The 32-byte key for `parameters` (None: not a passphrase's); `asked_by` names the file
        in errors."""
        ...


class GivenKey:
    """A 32-byte key, the same for every file."""

    def __init__(self, key: bytes, origin: str) -> None:
        """``origin`` says where the key came from, for messages.

        Raises ValueError unless the key has 32 bytes.
        """
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes, not {len(key)}")
        self._key = Secret(key, origin)

    @property
    def origin(self) -> str:
        """Where the key came from, for messages."""
        return self._key.origin

    def reveal(self) -> bytes:
        """The 32-byte key, for encryption."""
        return self._key.reveal()

    @property
    def of_all_headers(self) -> bytes:
        """The 32-byte key."""
        return self._key.reveal()

    def for_header(self, header: TensorHeader) -> bytes:
        """The 32-byte key, also if the file has passphrase parameters: the key may be the one
        that was derived from that passphrase."""
        return self.for_parameters(header.key_derivation, header.source_name)

    def for_parameters(
        self,
        parameters: PasswordHash | None,  # noqa: ARG002 - ModelKey's interface
        asked_by: str,  # noqa: ARG002
    ) -> bytes:
        """The 32-byte key."""
        return self._key.reveal()

    def __repr__(self) -> str:
        return f"GivenKey({REDACTED}, origin={self.origin!r})"


class Passphrase:
    """A passphrase; each file has the parameters to derive its key. Thread-safe."""

    def __init__(self, passphrase: Secret) -> None:
        self._passphrase = passphrase
        self._derived: dict[PasswordHash, Secret] = {}
        # Held during a derivation: two threads must not allocate Argon2's memory twice.
        self._lock = threading.Lock()

    @property
    def origin(self) -> str:
        """Where the passphrase came from, for messages."""
        return self._passphrase.origin

    @property
    def of_all_headers(self) -> None:
        """Each header may have parameters of its own."""

    def for_header(self, header: TensorHeader) -> bytes:
        """The 32-byte key of the file that ``header`` is from, derived once for equal parameters.

        Raises WrongKeyError if the file was encrypted with a key instead of a passphrase,
        CorruptError if its parameters are out of bounds or it needs more than MAX_DERIVATIONS,
        ConfigurationError if there is not enough memory for them.
        """
        return self.for_parameters(header.key_derivation, header.source_name)

    def for_parameters(self, parameters: PasswordHash | None, asked_by: str) -> bytes:
        """The 32-byte key for `parameters`. `asked_by` names the file in errors, which are those
        of `for_header`."""
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
                        hint="tensorizer uses one for each file: this file is damaged or forged.",
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
        raise TypeError(
            "a passphrase is not picklable: pass it to a process with tensorserve.launch.handoff"
        )


def parse_key(given: Secret) -> GivenKey:
    """The key in ``given``: 32 raw bytes, or 32 bytes as hex or base64 text (padding optional).

    White space around text is ignored. Raises ConfigurationError for anything else; its message
    has the length found, never the value.
    """
    value = given.reveal()
    key = key_bytes(value)
    if key is not None:
        return GivenKey(key, given.origin)
    raise ConfigurationError(
        f"The key from {given.origin or 'the settings'} is not a 32-byte key: its {len(value)} "
        "bytes are neither 32 raw bytes nor 64 hex digits nor base64 of 32 bytes.",
        hint="Make one with `openssl rand -hex 32`. If it is a passphrase, "
        "set TENSORSERVE_PASSPHRASE_FILE instead.",
    )


def parse_passphrase(given: Secret) -> Passphrase:
    """The passphrase in ``given`` without trailing line breaks.

    Raises ConfigurationError if it is empty.
    """
    value = given.reveal().rstrip(b"\r\n")
    if not value:
        raise ConfigurationError(
            f"The passphrase from {given.origin or 'the settings'} is empty.",
            hint="Write the passphrase there that the bundle was encrypted with.",
        )
    return Passphrase(Secret(value, given.origin))
