"""What `tensorserve pack` takes on its command line, and what it means."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tensorserve.errors import UsageError
from tensorserve.fingerprint import HF, LAYOUTS, VLLM

if TYPE_CHECKING:
    # Every command reads this file; only `pack` needs these.
    from tensorserve.packing import PackResult, Progress
    from tensorserve.sources import Access


def add_pack_options(pack: argparse.ArgumentParser) -> None:
    """The options of `pack`."""
    pack.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="directory with safetensors and config.json, or organisation/model of the hub",
    )
    pack.add_argument("destination", metavar="DEST", help="directory or s3://bucket/prefix")
    pack.add_argument(
        "--encrypt", action="store_true", help="encrypt the weights with a 32-byte key"
    )
    pack.add_argument("--key-file", type=Path, help="the key; made (0600) if it does not exist")
    pack.add_argument("--passphrase-file", type=Path, help="encrypt with a passphrase instead")
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
        help="hf (default): as in the checkpoint; needs no vLLM, fits any parallelism and version. "
        "vllm: each rank's parameters as this machine's vLLM holds them; builds the model in "
        "memory and fits only such an engine (docs/bundle-format.md)",
    )
    pack.add_argument(
        "--tensor-parallel-size",
        metavar="N",
        type=int,
        default=1,
        help="one file for each of N ranks, which each rank loads alone. Above 1 it means --layout "
        "vllm: only vLLM knows how a model is cut. A bundle of layout hf serves any N as it is",
    )
    pack.add_argument("--overwrite", action="store_true", help="replace an existing bundle")


def pack_as_asked(options: argparse.Namespace, access: Access, progress: Progress) -> PackResult:
    """Packs. Raises UsageError for options that contradict each other, and pack's errors."""
    from tensorserve.hub import model_directory
    from tensorserve.lora import read_adapters
    from tensorserve.packing import pack, with_suffix
    from tensorserve.packing_key import prepare_key
    from tensorserve.tensorizer_options import encrypting_threads

    if options.key_file and not options.encrypt:
        raise UsageError("--key-file without --encrypt.", hint="Add --encrypt.")
    if options.encrypt and not (options.key_file or options.passphrase_file):
        raise UsageError(
            "--encrypt needs a key.",
            hint="Add --key-file PATH (made if it does not exist) or --passphrase-file PATH.",
        )
    if options.passphrase_file and not options.encrypt:
        raise UsageError("--passphrase-file without --encrypt.", hint="Add --encrypt.")
    if options.tensor_parallel_size < 1:
        raise UsageError(f"--tensor-parallel-size {options.tensor_parallel_size} is below 1.")
    sharded = options.tensor_parallel_size > 1
    if sharded and options.layout == HF:
        raise UsageError(
            "--layout hf has no files for single ranks: it holds the checkpoint, which every rank "
            "cuts for itself.",
            hint="Leave --tensor-parallel-size out (such a bundle serves any size), or use "
            "--layout vllm.",
        )
    source, name = model_directory(options.source)
    destination = options.destination
    if options.suffix is not None:
        destination = with_suffix(destination, name, options.suffix)
    adapters = read_adapters(options.lora)
    threads = encrypting_threads(options.serialization_kwargs)
    key, passphrase = prepare_key(options.key_file, options.passphrase_file)
    return pack(
        source,
        destination,
        key=key,
        passphrase=passphrase,
        access=access,
        adapters=adapters,
        dtype=options.dtype,
        layout=VLLM if sharded else options.layout or HF,
        tensor_parallel_size=options.tensor_parallel_size,
        threads=threads,
        overwrite=options.overwrite,
        progress=progress,
    )
