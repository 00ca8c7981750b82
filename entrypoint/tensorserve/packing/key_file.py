"""Which key does `pack` encrypt with: one from a file, a passphrase, or a new key?"""

from __future__ import annotations

import os
from pathlib import Path

from tensorserve.bundle.keys import parse_key, parse_passphrase
from tensorserve.crypto.secret_file import read_secret
from tensorserve.errors import ConfigurationError, UsageError
from tensorserve.format import KEY_SIZE
from tensorserve.packing.disk_files import sync_directory
from tensorserve.secret import Secret


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
        passphrase = read_secret(passphrase_file, f"The passphrase file {passphrase_file}")
        parse_passphrase(passphrase)
        return None, passphrase
    if key_file is None:
        return None, None
    made = _make_key(key_file)
    key = Secret(made, f"{key_file} (new: keep a copy)") if made else None
    key = key or read_secret(key_file, f"The key file {key_file}")
    parse_key(key)
    return key, None


def fresh_key() -> Secret:
    """A new random key that is in no file: it is only wrapped (`pack --wrap`)."""
    return Secret(os.urandom(KEY_SIZE), "memory (new: it is nowhere but wrapped in the manifest)")


def new_key(key_file: Path | None) -> Secret:
    """The key for a new bundle: that of `key_file`, which is made if it does not exist, or one that
    is in no file. Raises as prepare_key."""
    key = prepare_key(key_file, None)[0]
    return fresh_key() if key is None else key


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
