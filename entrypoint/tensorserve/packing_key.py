"""Where does the key come from that `pack` seals with: a file of the user's, or a fresh one?"""

from __future__ import annotations

import os
from pathlib import Path

from tensorserve.destinations import sync_directory
from tensorserve.errors import ConfigurationError, UsageError
from tensorserve.format import KEY_SIZE
from tensorserve.keys import parse_key, parse_passphrase
from tensorserve.secret import Secret

_MAX_KEY_FILE = 4096


def prepare_key(
    key_file: Path | None, passphrase_file: Path | None
) -> tuple[Secret | None, Secret | None]:
    """(key, passphrase) for `pack`, from the files that the user names.

    A key file that does not exist is made: 32 random bytes, raw, as vLLM's `encryption_keyfile`
    wants them, readable by its owner only. Raises UsageError if both are given, ConfigurationError
    if a file cannot be read or made or holds no key.
    """
    if key_file is not None and passphrase_file is not None:
        raise UsageError("--key-file and --passphrase-file exclude each other.")
    if passphrase_file is not None:
        passphrase = Secret(_read_secret(passphrase_file), str(passphrase_file))
        parse_passphrase(passphrase)
        return None, passphrase
    if key_file is None:
        return None, None
    made = _make_key(key_file)
    key = Secret(made, f"{key_file} (new: keep a copy)") if made else None
    key = key or Secret(_read_secret(key_file), str(key_file))
    parse_key(key)
    return key, None


def _make_key(path: Path) -> bytes | None:
    """A fresh key, written to `path`; None if that exists."""
    key = os.urandom(KEY_SIZE)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    except OSError as error:
        raise ConfigurationError(
            f"The key file {path} could not be made: {error.strerror}.",
            hint="Name a file in a directory that exists and can be written.",
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        # The bundle may outlive this machine: the key must not be lost with its power.
        sync_directory(path.parent)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigurationError(
            f"The key file {path} could not be written: {error.strerror}."
        ) from error
    return key


def _read_secret(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY_FILE + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} could not be read: {error.strerror}.") from error
    if len(data) > _MAX_KEY_FILE:
        raise ConfigurationError(
            f"{path} holds more than {_MAX_KEY_FILE} bytes: it is no key or passphrase."
        )
    return data
