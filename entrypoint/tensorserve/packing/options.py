"""Which command-line options does `tensorserve pack` have, and how do they reach `pack()`?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tensorserve.bundle.engine_fingerprint import HF, LAYOUTS, VLLM
from tensorserve.errors import UsageError

if TYPE_CHECKING:
    # Every command imports this file; only `pack` needs these modules.
    from tensorserve.packing.bundle_files import Progress
    from tensorserve.packing.model_signer import BundleSigner
    from tensorserve.packing.pack_result import PackResult
    from tensorserve.sources import Access
    from tensorserve.wrapping.base import Services


def add_pack_options(pack: argparse.ArgumentParser) -> None:
    """Adds the options of `pack` to its parser."""
    pack.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="directory with safetensors and config.json, or organisation/model of the hub",
    )
    pack.add_argument(
        "destination",
        metavar="DEST",
        help="directory, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
    )
    pack.add_argument(
        "--encrypt", action="store_true", help="encrypt the weights with a 32-byte key"
    )
    pack.add_argument("--key-file", type=Path, help="the key; made (0600) if it does not exist")
    pack.add_argument("--passphrase-file", type=Path, help="encrypt with a passphrase instead")
    pack.add_argument(
        "--wrap",
        metavar="PROVIDER:KEY",
        action="append",
        default=[],
        help="wrap the key for a recipient, in the manifest: file:PATH, age:RECIPIENT, "
        "vault:MOUNT/KEY, awskms:KEY, gcpkms:NAME or azurekeyvault://VAULT/KEY (docs/keys.md); may "
        "be repeated. Without --key-file the key is new and nowhere else",
    )
    add_sign_options(pack)
    pack.add_argument(
        "--suffix", help="version of the model: the bundle goes to DEST/vllm/<name of SRC>/SUFFIX"
    )
    pack.add_argument(
        "--lora",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="a LoRA adapter (PEFT's directory) to be served under NAME; may be repeated",
    )
    pack.add_argument(
        "--draft",
        metavar="DIR",
        action="append",
        default=[],
        help="the draft model for speculative decoding, or EAGLE heads: its directory, or "
        "organisation/model of the hub. Packed unchanged (--dtype and --layout apply to the model "
        "only); served if --speculative-config names no model",
    )
    pack.add_argument(
        "--dtype", help="convert floating-point weights: bfloat16, float16 or float32"
    )
    pack.add_argument(
        "--serialization-kwargs",
        metavar="JSON",
        default="{}",
        help="tensorizer's options for writing, as in vLLM's example: "
        "'{\"limit_cpu_concurrency\": 2}'",
    )
    pack.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="hf (default): tensors as in the checkpoint; needs no vLLM, serves any parallelism "
        "and version. vllm: each rank's parameters as this machine's vLLM holds them; builds the "
        "model in memory and serves only the same engine (docs/bundle-format.md)",
    )
    pack.add_argument(
        "--tensor-parallel-size",
        metavar="N",
        type=int,
        default=1,
        help="one file for each of N ranks; each rank loads its own file. Above 1 it implies "
        "--layout vllm, because vLLM shards the model. A bundle of layout hf serves any N",
    )
    pack.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="include the model's Python files, which vLLM runs if it is started with the flag of "
        "this name. Review them first",
    )
    pack.add_argument("--overwrite", action="store_true", help="replace an existing bundle")


def add_sign_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options with which commands that write a bundle sign it."""
    parser.add_argument(
        "--sign-key",
        metavar="PEM",
        help="sign the bundle with this EC private key, a file or pkcs11:…: model.sig, as "
        "OpenSSF's model_signing makes and verifies it (docs/signatures.md)",
    )
    parser.add_argument(
        "--sign-certificates",
        metavar="PEM",
        type=Path,
        help="the key's certificate, then those above it, to go into the signature",
    )
    parser.add_argument(
        "--sign-identity-token",
        metavar="FILE",
        help="sign by Sigstore's keyless signing instead, with the OIDC token in this file, or "
        "`ambient`: the one that the CI job or machine gives (docs/signatures.md)",
    )
    parser.add_argument(
        "--sign-trust-config",
        metavar="FILE",
        type=Path,
        help="a Sigstore instance of one's own: its client trust configuration. Without it, the "
        "public one signs, and its log shows the identity to everybody",
    )


def signer_of(options: argparse.Namespace) -> BundleSigner | None:
    """Who is to sign. Raises UsageError, and ConfigurationError for files that do not fit."""
    if options.sign_key is None and options.sign_certificates is not None:
        raise UsageError("--sign-certificates without --sign-key.", hint="Add --sign-key.")
    if options.sign_identity_token is None:
        if options.sign_trust_config is not None:
            raise UsageError(
                "--sign-trust-config without --sign-identity-token.",
                hint="Add --sign-identity-token.",
            )
        if options.sign_key is None:
            return None
        from tensorserve.packing.model_signer import ModelSigner

        return ModelSigner.read(options.sign_key, options.sign_certificates)
    if options.sign_key is not None:
        raise UsageError(
            "Both --sign-key and --sign-identity-token are given: a bundle has one signature.",
            hint="Leave one of them out.",
        )
    from tensorserve.packing.keyless_signer import KeylessSigner

    return KeylessSigner.read(options.sign_identity_token, options.sign_trust_config)


def pack_as_asked(
    options: argparse.Namespace, access: Access, progress: Progress, services: Services
) -> PackResult:
    """Packs with the parsed `options`. Raises UsageError for contradicting ones, and pack's errors.

    `progress` is called with (bytes of tensors written, bytes of tensors in all). `services` say
    how the recipients of --wrap are reached.
    """
    from tensorserve.config.tensorizer_options import encrypting_threads
    from tensorserve.packing.draft_checkpoint import read_draft
    from tensorserve.packing.hub import model_directory
    from tensorserve.packing.key_file import fresh_key, prepare_key
    from tensorserve.packing.lora import read_adapters
    from tensorserve.packing.pack import pack, with_suffix
    from tensorserve.wrapping.providers import for_wrapping

    if options.key_file and not options.encrypt:
        raise UsageError("--key-file without --encrypt.", hint="Add --encrypt.")
    if options.encrypt and not (options.key_file or options.passphrase_file or options.wrap):
        raise UsageError(
            "--encrypt needs a key.",
            hint="Add --key-file PATH (made if it does not exist), --passphrase-file PATH, or "
            "--wrap PROVIDER:KEY.",
        )
    if options.wrap and not options.encrypt:
        raise UsageError("--wrap without --encrypt.", hint="Add --encrypt.")
    if options.wrap and options.passphrase_file:
        raise UsageError(
            "--wrap wraps a key, and --passphrase-file is given.", hint="Leave one of them out."
        )
    if options.passphrase_file and not options.encrypt:
        raise UsageError("--passphrase-file without --encrypt.", hint="Add --encrypt.")
    if options.tensor_parallel_size < 1:
        raise UsageError(f"--tensor-parallel-size {options.tensor_parallel_size} is below 1.")
    sharded = options.tensor_parallel_size > 1
    if sharded and options.layout == HF:
        raise UsageError(
            "--layout hf has no file for each rank: it holds the whole checkpoint, and each rank "
            "takes its shard while it loads.",
            hint="Leave --tensor-parallel-size out (a bundle of layout hf serves any size), or use "
            "--layout vllm.",
        )
    signer = signer_of(options)
    source, name = model_directory(options.source, code=options.trust_remote_code)
    destination = options.destination
    if options.suffix is not None:
        destination = with_suffix(destination, name, options.suffix)
    adapters = read_adapters(options.lora)
    if len(options.draft) > 1:
        raise UsageError(
            "--draft is given twice; vLLM uses one draft model.", hint="Leave one of them out."
        )
    draft = read_draft(options.draft[0]) if options.draft else None
    threads = encrypting_threads(options.serialization_kwargs)
    recipients = tuple(for_wrapping(text, services) for text in options.wrap)
    key, passphrase = prepare_key(options.key_file, options.passphrase_file)
    if recipients and key is None:
        key = fresh_key()
    return pack(
        source,
        destination,
        key=key,
        passphrase=passphrase,
        recipients=recipients,
        signer=signer,
        access=access,
        adapters=adapters,
        draft=draft,
        dtype=options.dtype,
        layout=VLLM if sharded else options.layout or HF,
        tensor_parallel_size=options.tensor_parallel_size,
        threads=threads,
        overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
        progress=progress,
    )
