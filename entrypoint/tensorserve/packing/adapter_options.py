"""Which command-line options does `tensorserve pack-adapter` have, and how do they reach its
function?"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tensorserve.errors import ConfigurationError, UsageError
from tensorserve.packing.options import add_sign_options, signer_of

if TYPE_CHECKING:
    # Every command imports this file; only `pack-adapter` needs these modules.
    from tensorserve.config.settings import SourceSettings
    from tensorserve.packing.bundle_files import Progress
    from tensorserve.packing.pack_adapter import PackedAdapter
    from tensorserve.secret import Secret


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `pack-adapter` to its parser."""
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="the adapter's directory: adapter_config.json and adapter_model.safetensors",
    )
    parser.add_argument(
        "destination",
        metavar="DEST",
        help="its folder in the store; the last part is the adapter's name: "
        "s3://bucket/adapters/sql",
    )
    parser.add_argument(
        "--encrypt", action="store_true", help="encrypt the weights, and authenticate the manifest"
    )
    parser.add_argument("--key-file", type=Path, help="the key; made (0600) if it does not exist")
    parser.add_argument("--passphrase-file", type=Path, help="encrypt with a passphrase instead")
    parser.add_argument(
        "--model",
        metavar="URI",
        help="the bundle of the model that it is for: with --encrypt, the key is that bundle's, "
        "from the settings that serve it (TENSORSERVE_KEY_FILE, TENSORSERVE_KEY_URI, …)",
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="serve it only with the model that is served under NAME (TENSORSERVE_MODEL_NAME)",
    )
    add_sign_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")


def pack_adapter_as_asked(
    options: argparse.Namespace,
    settings: SourceSettings,
    with_model_key: Callable[[str], SourceSettings],
    progress: Progress,
) -> PackedAdapter:
    """Packs with the parsed `options`. Raises UsageError for contradicting ones, and the errors of
    pack_adapter.

    `with_model_key` gives the settings with the key of the bundle at a URI. `progress` is called
    with (bytes of tensors written, bytes of tensors in all).
    """
    from tensorserve.config.access import access_for
    from tensorserve.packing.pack_adapter import identity_for, pack_adapter

    identity = identity_for(options.destination, options.base_model)
    signer = signer_of(options)
    key, passphrase = _key(options, with_model_key)
    return pack_adapter(
        options.source,
        options.destination,
        identity,
        access=access_for(settings),
        key=key,
        passphrase=passphrase,
        signer=signer,
        overwrite=options.overwrite,
        progress=progress,
    )


def _key(
    options: argparse.Namespace, with_model_key: Callable[[str], SourceSettings]
) -> tuple[Secret | None, Secret | None]:
    from tensorserve.packing.key_file import prepare_key

    given = [
        flag
        for flag, value in (
            ("--key-file", options.key_file),
            ("--passphrase-file", options.passphrase_file),
            ("--model", options.model),
        )
        if value is not None
    ]
    if not options.encrypt:
        if given:
            raise UsageError(f"{given[0]} without --encrypt.", hint="Add --encrypt.")
        return None, None
    if not given:
        raise UsageError(
            "--encrypt needs a key.",
            hint="Add --model URI (the key of that bundle, which opens its adapters by default), "
            "--key-file PATH (made if it does not exist), or --passphrase-file PATH.",
        )
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other.", hint="Leave one out.")
    if options.model is None:
        return prepare_key(options.key_file, options.passphrase_file)
    settings = with_model_key(options.model)
    if settings.key is None and settings.passphrase is None:
        raise ConfigurationError(
            "--model gives no key: none is set, and the bundle's manifest has none wrapped for a "
            "service that is set up here.",
            hint="Set what a start with this bundle needs (TENSORSERVE_KEY_FILE, "
            "TENSORSERVE_PASSPHRASE_FILE or TENSORSERVE_KEY_URI), or give --key-file.",
        )
    return settings.key, settings.passphrase
