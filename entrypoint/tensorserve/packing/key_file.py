"""Which key does `pack` encrypt with: one from a file, a passphrase, or a new key?"""

from __future__ import annotations

import os
from pathlib import Path

from tensorserve.bundle.keys import parse_key, parse_passphrase
from tensorserve.errors import ConfigurationError, UsageError
from tensorserve.format import KEY_SIZE
from tensorserve.packing.disk_files import sync_directory
from tensorserve.secret import Secret

_MAX_KEY_FILE = 4096


def prepare_key(
    key_file: Path | None, passphrase_file: Path | None
) -> tuple[Secret | None, Secret | None]:
    """(key, passphrase) for `pack`, from the user's files; None for a file that is not given.

    A key file that does not exist is created: 32 random bytes, raw, as vLLM's `encryption_keyfile`
    expects, with mode 0600. Raises UsageError if both files are given, ConfigurationError if a
    file cannot be read or created, or has no valid content.
    """
    if key_file is not None and passphrase_file is not None:
        raise UsageError(
            "--key-file and --passphrase-file exclude each other.", hint="Leave one of them out."
        )
    if passphrase_file is not None:
        passphrase = Secret(read_secret(passphrase_file), str(passphrase_file))
        parse_passphrase(passphrase)
        return None, passphrase
    if key_file is None:
        return None, None
    made = _make_key(key_file)
    key = Secret(made, f"{key_file} (new: keep a copy)") if made else None
    key = key or Secret(read_secret(key_file), str(key_file))
    parse_key(key)
    return key, None


def fresh_key() -> Secret:
    """A new random key that is in no file: it is only wrapped (`pack --wrap`)."""
    return Secret(os.urandom(KEY_SIZE), "memory (new: it is nowhere but wrapped in the manifest)")


def _make_key(path: Path) -> bytes | None:
    """A new random key, written to `path`; None if `path` exists."""
    key = os.urandom(KEY_SIZE)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    except OSError as error:
        raise ConfigurationError(
            f"The key file {path} could not be created: {error.strerror}.",
            hint="Name a file in an existing, writable directory.",
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        # The bundle may be in remote storage: a power failure here must not lose its key.
        sync_directory(path.parent)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigurationError(
            f"The key file {path} could not be written: {error.strerror}."
        ) from error
    return key


def read_secret(path: Path, most: int = _MAX_KEY_FILE) -> bytes:
    """The content of a small file with a secret, of at most `most` bytes.

    Raises ConfigurationError if it cannot be read or is larger.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} could not be read: {error.strerror}.") from error
    if len(data) > most:
        raise ConfigurationError(
            f"{path} has more than {most} bytes: it is not what it is given for."
        )
    return data
