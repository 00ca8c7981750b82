"""Which commands make, change or read bundles?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from tensorserve.commands.terminal import (
    ByteBar,
    read_settings,
    read_settings_with_key,
    stop_cleanly,
    typed_uri,
)
from tensorserve.errors import UsageError


def run_pack(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.config.access import access_for, services_for
    from tensorserve.packing.options import pack_as_asked

    stop_cleanly()
    options.destination = typed_uri(options.destination, "DEST")
    settings = read_settings(environ)
    with ByteBar("packing") as bar:
        result = pack_as_asked(options, access_for(settings), bar, services_for(settings))
    print(result)
    return 0


def run_pack_adapter(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.packing.adapter_options import pack_adapter_as_asked

    stop_cleanly()
    options.destination = typed_uri(options.destination, "DEST")
    if options.model is not None:
        options.model = typed_uri(options.model, "--model")
    settings = read_settings(environ)
    with ByteBar("packing") as bar:
        done = pack_adapter_as_asked(
            options, settings, lambda uri: read_settings_with_key(environ, uri), bar
        )
    print(done)
    return 0


def run_verify(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.bundle.location import split_model_uri
    from tensorserve.bundle.model_signature import read_signature
    from tensorserve.bundle.verify import verify
    from tensorserve.config.access import access_for, compiled_key_for, key_for
    from tensorserve.config.signature import trust_for
    from tensorserve.crypto.ed25519 import VerifyingKey

    uri = typed_uri(options.uri, "URI")
    settings = read_settings_with_key(environ, uri)
    access, key = access_for(settings), key_for(settings)
    signer = settings.compiled_signature_key
    trust, signature = trust_for(settings), None
    if trust is not None:
        signature = read_signature(split_model_uri(uri)[0], access, trust)
    with ByteBar("verifying") as bar:
        verify(
            uri,
            access,
            key,
            bar.print,
            bar,
            wish=settings.verify,
            pin=settings.manifest_sha256,
            compiled_key=compiled_key_for(settings, encrypted=key is not None),
            compiled_signature_key=None if signer is None else VerifyingKey.parse(signer),
            signature=signature,
        )
    return 0


def run_sign(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.bundle.location import split_model_uri
    from tensorserve.config.access import access_for, key_for
    from tensorserve.config.signature import without_trust
    from tensorserve.config.unwrapping import with_key
    from tensorserve.packing.options import signer_of
    from tensorserve.packing.sign import sign

    stop_cleanly()
    uri = typed_uri(options.uri, "URI")
    signer = signer_of(options)
    # It may not be signed yet.
    given = without_trust(read_settings(environ))
    settings = with_key(given, split_model_uri(uri)[0])
    access, key = access_for(settings), key_for(settings)
    with ByteBar("verifying") as bar:
        signed = sign(
            uri,
            access,
            key,
            bar.print,
            bar,
            wish=settings.verify,
            pin=settings.manifest_sha256,
            signer=signer,
        )
    print(signed)
    return 0


def run_rewrap(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.config.access import access_for, key_for, services_for
    from tensorserve.config.signature import trust_for
    from tensorserve.config.unwrapping import with_key
    from tensorserve.packing.options import signer_of
    from tensorserve.packing.rewrap import rewrap

    stop_cleanly()
    uri = typed_uri(options.uri, "URI")
    signer = signer_of(options)
    given = read_settings(environ)
    settings = with_key(given, uri)
    done = rewrap(
        uri,
        access_for(settings),
        key_for(settings),
        services_for(given),
        add=options.add,
        remove=options.remove,
        pin=settings.manifest_sha256,
        signer=signer,
        trust=trust_for(settings),
    )
    print(done)
    return 0


def run_rekey(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.bundle.keys import parse_key
    from tensorserve.config.access import access_for, key_for, services_for
    from tensorserve.config.unwrapping import with_key
    from tensorserve.packing.key_file import new_key
    from tensorserve.packing.options import signer_of
    from tensorserve.packing.rekey import rekey
    from tensorserve.wrapping.providers import for_wrapping

    stop_cleanly()
    uri, destination = typed_uri(options.uri, "URI"), typed_uri(options.destination, "DEST")
    if not options.wrap and options.key_file is None:
        raise UsageError(
            "`rekey` needs a new key.",
            hint="Add --wrap PROVIDER:KEY, or --key-file PATH (made if it does not exist).",
        )
    signer = signer_of(options)
    given = read_settings(environ)
    settings = with_key(given, uri)
    services = services_for(given)
    recipients = [for_wrapping(text, services) for text in options.wrap]
    with ByteBar("sealing anew") as bar:
        done = rekey(
            uri,
            destination,
            access_for(settings),
            key_for(settings),
            parse_key(new_key(options.key_file)),
            recipients=recipients,
            signer=signer,
            overwrite=options.overwrite,
            pin=settings.manifest_sha256,
            progress=bar,
        )
    print(done)
    return 0


def run_precompile(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.packing.precompile import precompile

    stop_cleanly()
    made = precompile(
        typed_uri(options.uri, "URI"),
        environ,
        options.arguments,
        options.sign_key,
        lambda line: print(f"tensorserve: {line}", file=sys.stderr, flush=True),
    )
    print(made)
    return 0
