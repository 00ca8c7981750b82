"""How does a Hugging Face directory become a bundle: tensors, small files, manifest?

Pickles are never opened. In layout `hf` no model code runs: tensors are copied from safetensors to
.tensors files as bytes, one at a time, and encrypted before they are written. There is no plain
copy and, for S3, no copy on disk.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tensorserve.bundle.adapters import ADAPTERS, WEIGHTS, adapter_file
from tensorserve.bundle.draft import DRAFTS, draft_file
from tensorserve.bundle.engine_fingerprint import HF, VLLM
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.manifest import (
    MANIFEST,
    SIGNATURE,
    SINGLE,
    Manifest,
    model_files,
)
from tensorserve.bundle.manifest_mac import Parameters
from tensorserve.bundle.nested_weights import bundle_name
from tensorserve.bundle.stand_ins import stand_ins_of
from tensorserve.errors import ConfigurationError, UsageError
from tensorserve.format import (
    fresh_password_hash,
)
from tensorserve.launch.completeness import what_a_start_misses
from tensorserve.packing.bundle_files import (
    SPARE_BYTES,
    ByteCount,
    PlannedFile,
    Progress,
    copy_file,
    encryption_of,
    given_key,
    write_small,
    write_tensors,
)
from tensorserve.packing.checkpoint import Checkpoint, read_checkpoint
from tensorserve.packing.destination import open_destination
from tensorserve.packing.draft_checkpoint import refuse_drafts_alone
from tensorserve.packing.dtype_conversion import Casting
from tensorserve.packing.model_signer import BundleSigner
from tensorserve.packing.nested_checkpoint import read_nested
from tensorserve.packing.pack_result import PackResult
from tensorserve.packing.rank_parameters import engine_parameters
from tensorserve.packing.recipients import wrapped_for
from tensorserve.packing.tensor_source import from_checkpoint
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources import Access
from tensorserve.version import __version__
from tensorserve.wrapping.base import Provider


def pack(
    src: Path,
    dest: str,
    *,
    access: Access,
    key: Secret | None = None,
    passphrase: Secret | None = None,
    recipients: Sequence[Provider] = (),
    signer: BundleSigner | None = None,
    adapters: Mapping[str, Checkpoint] | None = None,
    draft: tuple[str, Checkpoint] | None = None,
    dtype: str | None = None,
    layout: str = HF,
    tensor_parallel_size: int = 1,
    threads: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Packs `src` (a Hugging Face directory, or one safetensors file in one) into a bundle.

    `dest` is a directory or s3://, gs:// or az://; `overwrite` allows it to hold a bundle, which is
    replaced. With a key or a passphrase (not both) all tensors are encrypted, also those of
    `adapters` (packing/lora.py) and of the `draft` model (packing/draft_checkpoint.py). `key` is
    wrapped for each of `recipients`, which are asked before anything is written. `signer` signs all
    files of the bundle.
    `trust_remote_code` includes the model's Python files. `dtype` converts its floating-point
    tensors (packing/dtype_conversion.py). `threads` is the most threads that encrypt.

    `layout` "vllm" writes the parameters of `tensor_parallel_size` ranks as vLLM holds them
    (packing/rank_parameters.py); vLLM then has the whole model in memory. Memory otherwise: three
    times the largest tensor, and four parts of 16 MiB for S3.

    On any error, KeyboardInterrupt included, the written files are removed. Raises
    ConfigurationError for an unsuitable source, destination or key, CorruptError for a damaged
    source, and the destination's and the recipients' errors.
    """
    started = time.monotonic()
    if layout == HF and tensor_parallel_size > 1:
        raise ConfigurationError(
            "Layout 'hf' has no shards: only layout 'vllm' has a file for each rank.",
            hint="Use layout 'vllm', or a tensor-parallel size of 1: layout 'hf' serves any size.",
        )
    opened_by = given_key(key, passphrase)
    checkpoint = read_checkpoint(src, code=trust_remote_code)
    refuse_drafts_alone(checkpoint)
    notes = _notes(checkpoint, trust_remote_code)
    refuse_inside(checkpoint, dest)
    casting = Casting(checkpoint, dtype) if dtype is not None else None
    if casting is not None:
        checkpoint = casting.checkpoint
    # Nested weights, which vLLM opens itself. Stand-ins follow below.
    nested = {
        name: replace(checkpoint, tensors=tensors, files={})
        for name, tensors in read_nested(checkpoint.directory).items()
    }
    derivation = fresh_password_hash() if passphrase is not None else None
    parameters, wrapped = None, None
    if recipients:
        if not isinstance(opened_by, GivenKey):
            raise ConfigurationError("There is no key to wrap.", hint="Give a key.")
        parameters = Parameters.fresh(None)
        secret = Secret(opened_by.reveal(), opened_by.origin)
        wrapped = wrapped_for(recipients, secret, parameters.salt)
    folders = {"": checkpoint} | {
        adapter_file(name, ""): adapter for name, adapter in sorted((adapters or {}).items())
    }
    if draft is not None:
        folders[draft_file(draft[0], "")] = draft[1]
    _refuse_name_collisions(model_files(tensor_parallel_size), folders)
    stand_ins = [
        (folder + stand_in.name, stand_in.data)
        for folder, one in folders.items()
        if not folder.startswith(f"{ADAPTERS}/")  # vLLM reads an adapter's real weights
        for stand_in in stand_ins_of(
            one.directory if folder else src,
            {tensor.path.name for tensor in one.tensors},
            casting.dtype_of if casting is not None and not folder else None,
        )
    ]
    needed = sum(_size(one) for one in (*folders.values(), *nested.values())) + SPARE_BYTES
    needed += sum(len(data) for _, data in stand_ins)
    # The destination is checked before vLLM spends time on building a model.
    with open_destination(dest, access, overwrite=overwrite, needed=needed) as destination:
        with ExitStack() as stack:
            fingerprint, ranks = None, [from_checkpoint(checkpoint, casting)]
            if layout == VLLM:
                engine = engine_parameters(src, dtype, tensor_parallel_size, trust_remote_code)
                fingerprint, ranks = stack.enter_context(engine)
            named = dict(zip(model_files(len(ranks)), ranks, strict=True)) | {
                _weights(folder): from_checkpoint(one) for folder, one in folders.items() if folder
            }
            named |= {bundle_name(name): from_checkpoint(one) for name, one in nested.items()}
            files = [
                PlannedFile(name, source, opened_by is not None, derivation)
                for name, source in named.items()
            ]
            count = ByteCount(sum(file.plan.index.data_bytes for file in files), progress)
            # The largest files are the likeliest to fail, so they come first. The manifest, which
            # makes the directory a bundle, comes last.
            signed: dict[str, str] | None = None if signer is None else {}
            tensors = {
                file.name: write_tensors(destination, file, opened_by, count, threads, signed)
                for file in files
            }
        small = tuple(
            write_small(destination, name, casting.config())
            if casting is not None and folder + name == "config.json"
            else copy_file(destination, one, name, size, folder + name)
            for folder, one in folders.items()
            for name, size in one.files.items()
        )
        small += tuple(write_small(destination, name, data) for name, data in stand_ins)
        manifest = Manifest(
            files=small,
            tensors_files=tensors,
            encryption=encryption_of(opened_by),
            made_by={"tensorserve": __version__},
            fingerprint=fingerprint,
            parameters=parameters,
            wrapped_keys=wrapped,
        ).to_json(opened_by, derivation)
        if signer is not None and signed is not None:
            signature = signer.sign_bundle(signed, small, manifest, dest)
            write_small(destination, SIGNATURE, signature)
        written = write_small(destination, MANIFEST, manifest)
    return PackResult(
        destination=redact_uri(dest),
        tensors=sum(len(file.plan.index.tensors) for file in files),
        data_bytes=count.whole,
        ranks=len(ranks),
        files=tuple(checkpoint.files),
        left_out={
            folder + name: why
            for folder, one in folders.items()
            for name, why in one.left_out.items()
            if folder + name not in nested
        },
        adapters=tuple(sorted(adapters or ())),
        draft=draft[0] if draft else None,
        nested=tuple(nested),
        key_origin=opened_by.origin if opened_by else None,
        recipients=() if wrapped is None else tuple(map(str, wrapped.recipients)),
        key_fingerprint=None if wrapped is None else wrapped.fingerprint,
        manifest_sha256=written.sha256,
        signed_by=None if signer is None else str(signer.by),
        seconds=time.monotonic() - started,
        code={entry.name: entry.sha256 for entry in small if entry.name.endswith(".py")},
        notes=notes,
    )


def with_suffix(dest: str, model: str, suffix: str) -> str:
    """`dest`/vllm/<model>/<suffix>, the path that vLLM's tensorize script uses.

    Raises UsageError if `model` or `suffix` cannot be part of a path.
    """
    for part in (model, suffix):
        if leaves_bundle(part):
            raise UsageError(f"--suffix: {part!r} cannot be part of a path.")
    return f"{dest.rstrip('/')}/vllm/{model}/{suffix}"


def _notes(checkpoint: Checkpoint, code: bool) -> tuple[str, ...]:
    """Sentences about what a start may lack. Raises ConfigurationError for missing code files."""
    missed = what_a_start_misses(
        checkpoint.files, lambda name: (checkpoint.directory / name).read_bytes(), code=code
    )
    if not checkpoint.missing_tensors:
        return missed
    names = checkpoint.missing_tensors
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"the index names tensors that its files lack, which vLLM ignores: "
        f"{', '.join(names[:3])}{more}",
        *missed,
    )


def _size(checkpoint: Checkpoint) -> int:
    """The approximate size in bytes; SPARE_BYTES covers headers and tags."""
    return sum(t.length for t in checkpoint.tensors) + sum(checkpoint.files.values())


def _refuse_name_collisions(model: tuple[str, ...], folders: Mapping[str, Checkpoint]) -> None:
    names = [*model, *(_weights(folder) for folder in folders if folder)]
    names += [folder + name for folder, one in folders.items() for name in one.files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"Two files would have the same name in the bundle: {twice[0]}, in the model's own "
            "directory and for an adapter or the draft.",
            hint="Rename the adapter, or the draft's directory.",
        )


def _weights(folder: str) -> str:
    """The .tensors file in an adapter's or the draft's folder."""
    return folder + (SINGLE if folder.startswith(f"{DRAFTS}/") else WEIGHTS)


def refuse_inside(checkpoint: Checkpoint, dest: str) -> None:
    """Raises ConfigurationError for a destination inside the directory that is packed."""
    if "://" in dest:
        return
    source, target = checkpoint.directory.resolve(), Path(dest).resolve()
    if target.is_relative_to(source):
        raise ConfigurationError(
            f"The bundle would be inside the model's own directory {source}.",
            hint="Give a directory outside it.",
        )
