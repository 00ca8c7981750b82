"""age recipients (https://age-encryption.org/v1): X25519, by rage's library (pyrage).

The packing machine needs the public recipient alone, and cannot read what it has packed. For the
same reason anybody can wrap a key of his own for a recipient: config/unwrapping.py demands the
key's fingerprint or a pin. age has no associated data, so the binding is sealed with the key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from typing import Any

from tensorserve.crypto.secret_file import read_absolute
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret
from tensorserve.wrapping.base import Binding, Provider, Reference, Services, WrappedKey, foreign

_RECIPIENT = re.compile(r"age1[02-9ac-hj-np-z]{58}")
_DIGEST_BYTES = 32
_IDENTITY = "AGE-SECRET-KEY-1"


class _Recipient(Provider):
    """A public recipient, for wrapping."""

    kind = "age"
    proves_sender = False

    def __init__(self, recipient: str) -> None:
        self._recipient = recipient
        try:
            self._parsed = _library().x25519.Recipient.from_str(recipient)
        except _library().RecipientError as error:
            raise _no_recipient(recipient) from error

    @property
    def key(self) -> str:
        """The recipient, `age1…`."""
        return self._recipient

    def describe(self, key: str = "") -> str:  # noqa: ARG002 - Provider's interface
        """As Provider.describe."""
        return f"age:{self._recipient}"

    def wrap(self, model_key: Secret, binding: Binding) -> str:
        """As Provider.wrap: base64 of an age file with the binding's SHA-256 and the key."""
        sealed = _library().encrypt(_digest(binding) + model_key.reveal(), [self._parsed])
        return base64.b64encode(sealed).decode()

    def unwrap(
        self,
        entry: WrappedKey,  # noqa: ARG002 - Provider's interface
        binding: Binding,  # noqa: ARG002
    ) -> bytes:
        """Raises ConfigurationError: a recipient only wraps."""
        raise _needs_identity(f"age:{self._recipient}")


class _Identities(Provider):
    """The identities of one file, for unwrapping."""

    kind = "age"
    proves_sender = False

    def __init__(self, secret: Secret) -> None:
        """Raises ConfigurationError where the file has no X25519 identity."""
        self._origin = secret.origin
        self._identities: list[Any] = []
        for line in secret.reveal_text().splitlines():
            line = line.strip()
            if line.startswith(_IDENTITY):
                self._identities.append(_identity(line, secret.origin))
        if not self._identities:
            raise ConfigurationError(
                f"The age identity {secret.origin} has no line that begins with {_IDENTITY}.",
                hint="Make one with `age-keygen -o FILE`. Identities of plugins, SSH and of "
                "passphrases are not supported.",
            )
        self._recipients = tuple(str(one.to_public()) for one in self._identities)

    @property
    def key(self) -> str:
        """The recipient of the first identity."""
        return self._recipients[0]

    def describe(self, key: str = "") -> str:  # noqa: ARG002 - Provider's interface
        """As Provider.describe."""
        return f"age:{self._origin} ({', '.join(self._recipients)})"

    def opens(self, entry: WrappedKey) -> bool:
        """As Provider.opens: for any identity of the file."""
        return entry.provider == self.kind and entry.key in self._recipients

    def wrap(self, model_key: Secret, binding: Binding) -> str:
        """As Provider.wrap, for the first identity's recipient."""
        return _Recipient(self.key).wrap(model_key, binding)

    def unwrap(self, entry: WrappedKey, binding: Binding) -> bytes:
        """As Provider.unwrap."""
        library = _library()
        try:
            box = base64.b64decode(entry.wrapped, validate=True)
            opened: bytes = library.decrypt(box, self._identities)
        except (binascii.Error, library.DecryptError) as error:
            raise foreign(self.describe()) from error
        digest, key = opened[:_DIGEST_BYTES], opened[_DIGEST_BYTES:]
        if not hmac.compare_digest(digest, _digest(binding)):
            raise foreign(self.describe())
        return key


def to_wrap(reference: Reference, _services: Services) -> Provider:
    """The recipient of age:age1…, or of the first identity in age:/PATH. Raises
    ConfigurationError."""
    if reference.host is None and reference.key.startswith("/"):
        return _Recipient(_Identities(read_absolute(reference.key, "The age identity")).key)
    if reference.host is not None or not _RECIPIENT.fullmatch(reference.key):
        raise _no_recipient(str(reference))
    return _Recipient(reference.key)


def to_unwrap(reference: Reference, _services: Services) -> Provider:
    """The identities in age:PATH. Raises ConfigurationError."""
    if reference.host is not None or not reference.key.startswith("/"):
        raise _needs_identity(str(reference) if _RECIPIENT.fullmatch(reference.key) else "This")
    return _Identities(read_absolute(reference.key, "The age identity"))


def _identity(line: str, origin: str) -> Any:
    library = _library()
    try:
        return library.x25519.Identity.from_str(line)
    except library.IdentityError:
        # Not "from error": pyrage's message could show a part of it.
        raise ConfigurationError(
            f"The age identity {origin} has a line that is no X25519 identity.",
            hint="Was it cut off? `age-keygen -y FILE` shows its recipient.",
        ) from None


def _digest(binding: Binding) -> bytes:
    return hashlib.sha256(binding.text()).digest()


def _no_recipient(text: str) -> ConfigurationError:
    return ConfigurationError(
        f"{text[:80]} is not an age recipient.",
        hint="It begins with age1 and has 62 characters: `age-keygen -y FILE` shows it.",
    )


def _needs_identity(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} does not name the file of an age identity, which unwrapping needs.",
        hint="For example TENSORSERVE_KEY_URI=age:/run/secrets/age-identity.",
    )


def _library() -> Any:
    try:
        import pyrage
    except ImportError as error:
        raise ConfigurationError(
            "age: needs pyrage, which is not installed here.",
            hint="Install it: pip install 'tensorserve[age]'.",
        ) from error
    return pyrage
