"""How are a bundle's small files (configuration, tokenizer) copied to local disk for vLLM?"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from tensorserve import sources
from tensorserve.bundle.compiled import FOLDER as COMPILED
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.bundle.manifest import MANIFEST, SIGNATURE, Manifest
from tensorserve.bundle.not_a_bundle import refuse_web_page
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, ForbiddenError, NotFoundError

# Weights are not copied: .tensors files are streamed, other formats are not used.
WEIGHT_SUFFIXES = (
    ".tensors",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)
# A .safetensors file in a manifest is a stand-in made by `pack`: a header without data
# (bundle/stand_ins.py).
STAND_IN_SUFFIX = ".safetensors"
# Requested one by one if the source cannot list and the bundle has no manifest.
KNOWN_NAMES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "tekken.json", "params.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "quantize_config.json", "quantization_config.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json", "2_Dense/config.json", "hf_quant_config.json",
    "spiece.model", "sentencepiece.bpe.model", "spm.model", "tiktoken.model", "vocab.tiktoken",
    "tokenizer.model.v1", "tokenizer.model.v2", "tokenizer.model.v3",
)  # fmt: skip
MAX_FILE_BYTES = 512 * 1024**2
MAX_TOTAL_BYTES = 2 * 1024**3


def artifact_names(
    bundle_uri: str,
    access: Access,
    manifest: Manifest | None,
    *,
    remote_code: bool = False,
    sealed: bool = False,
) -> dict[str, int | None]:
    """The small files to fetch, as {relative name: size in bytes, or None if unknown}.

    The names come from the manifest, or else from a listing, or else from KNOWN_NAMES. Python
    files are included only with `remote_code`, because vLLM would run them. Raises CorruptError
    if the weights are `sealed`, a Python file is included and the manifest is not authenticated.
    """
    listed: dict[str, int | None]
    if manifest is not None:
        listed = {entry.name: entry.size for entry in manifest.files}
    elif (listing := sources.list_names(bundle_uri, access)) is not None:
        listed = dict(listing)
    else:
        listed = dict.fromkeys(KNOWN_NAMES)
    names = {
        name: size
        for name, size in sorted(listed.items())
        if (not name.endswith(WEIGHT_SUFFIXES) or _is_stand_in(name, manifest))
        and name not in {MANIFEST, SIGNATURE}
        and not name.startswith(f"{COMPILED}/")
        and not any(part.startswith(".") for part in PurePosixPath(name).parts)
        and (remote_code or not name.endswith(".py"))
    }
    if sealed:
        _refuse_unauthenticated_code(names, manifest)
    return names


def _is_stand_in(name: str, manifest: Manifest | None) -> bool:
    # Without a manifest the file may hold the whole model.
    return manifest is not None and name.endswith(STAND_IN_SUFFIX)


def _refuse_unauthenticated_code(names: Iterable[str], manifest: Manifest | None) -> None:
    """Raises CorruptError if `names` include Python code and the manifest is not authenticated.

    The code would run in the engine's process, which holds the key and the decrypted weights.
    """
    code = [name for name in names if name.endswith(".py")]
    if code and (manifest is None or not manifest.authenticated_by):
        raise CorruptError(
            f"--trust-remote-code would run {code[0]}, which no authenticated {MANIFEST} covers.",
            hint="Review the bundle's code, then add a manifest: `tensorserve sign URI`. Or "
            "serve without --trust-remote-code.",
        )


def fetch_artifacts(
    bundle_uri: str,
    access: Access,
    destination: Path,
    manifest: Manifest | None = None,
    *,
    remote_code: bool = False,
    sealed: bool = False,
) -> dict[str, int]:
    """Copies the bundle's small files below `destination`; returns {name: size in bytes}.

    `destination` is emptied first and has mode 0700. `remote_code` and `sealed` are as in
    artifact_names. With a `manifest`, each file's size and SHA-256 are compared with its entry. A
    file is complete or absent: it is written under a temporary name first. Raises CorruptError
    for a file that differs from the manifest, a name that leaves the directory, files that are
    too large, or a missing config.json; ConfigurationError if the disk is full or read-only; and
    the sources' errors.
    """
    names = artifact_names(bundle_uri, access, manifest, remote_code=remote_code, sealed=sealed)
    total = sum(size or 0 for size in names.values())
    _check_total(bundle_uri, total)
    _prepare(destination, total)
    digests = {entry.name: entry.sha256 for entry in manifest.files} if manifest else {}
    targets = {name: resolve_below(destination, name) for name in names}
    counting, arrived = threading.Lock(), 0

    def fetch(name: str) -> int | None:
        nonlocal arrived
        try:
            source = sources.open_source(sources.join(bundle_uri, name), access)
        except (NotFoundError, ForbiddenError):
            if names[name] is None:
                return None  # one of KNOWN_NAMES, which the model may lack
            raise
        try:
            if names[name] is None:
                refuse_web_page(source.name, source.read(0, min(source.size, 1024)))
            if source.size > MAX_FILE_BYTES:
                raise CorruptError(
                    f"{source.name} is {source.size} bytes; a file beside the weights may have "
                    f"{MAX_FILE_BYTES}: it is too large for a tokenizer.",
                    hint="Remove files from the bundle's directory that the model does not need.",
                )
            expected = names[name]
            if manifest is not None and source.size != expected:
                raise CorruptError(
                    f"{source.name} is {source.size} bytes, {MANIFEST} says {expected}.",
                    hint="The file was replaced or damaged. Upload the bundle again.",
                )
            # Sizes may be unknown before, or may have changed since the listing.
            with counting:
                arrived += source.size
                so_far = arrived
            _check_total(bundle_uri, so_far)
            _write(targets[name], source, digests.get(name))
            return source.size
        finally:
            source.close()

    with ThreadPoolExecutor(max_workers=8) as pool:
        fetched = dict(zip(names, pool.map(fetch, names), strict=True))
    written = {name: size for name, size in fetched.items() if size is not None}
    if "config.json" not in written and "params.json" not in written:
        raise CorruptError(
            f"The bundle has no config.json: {redact_uri(bundle_uri)}",
            hint="vLLM needs the model's config.json (and its tokenizer) beside the .tensors file. "
            "Pack the model with `tensorserve pack`, or copy them there.",
        )
    return written


def _check_total(bundle_uri: str, total: int) -> None:
    if total > MAX_TOTAL_BYTES:
        raise CorruptError(
            f"The small files of {redact_uri(bundle_uri)} take {total} bytes; "
            f"the limit is {MAX_TOTAL_BYTES}.",
            hint="Remove files from the bundle's directory that the model does not need.",
        )


def resolve_below(root: Path, name: str) -> Path:
    """`root/name`. Raises CorruptError if that path is not below `root`."""
    if leaves_bundle(name):
        raise CorruptError(f"The bundle names a file outside its own directory: {name!r}.")
    target = root.joinpath(*PurePosixPath(name).parts)
    if not target.parent.resolve().is_relative_to(root.resolve()):
        raise CorruptError(f"The bundle's file {name!r} would be written through a link.")
    return target


def _prepare(destination: Path, needed: int) -> None:
    try:
        if destination.is_symlink():
            raise ConfigurationError(f"{destination} is a symbolic link.", hint="Remove it.")
        if destination.exists():
            shutil.rmtree(destination)  # files of an earlier start
        destination.mkdir(parents=True, mode=0o700)
        free = shutil.disk_usage(destination).free
    except OSError as error:
        raise ConfigurationError(
            f"{destination} cannot be written: {error.strerror}.",
            hint="Mount a tmpfs there, or set TENSORSERVE_STATE_DIR to a writable directory.",
        ) from error
    if free < needed:
        raise ConfigurationError(
            f"{destination} has {free} bytes free, the bundle's small files need {needed}.",
            hint="Give the tmpfs more room, or set TENSORSERVE_STATE_DIR to a larger disk.",
        )


def _write(target: Path, source: sources.Source, sha256: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with open(partial, "wb", opener=lambda p, f: os.open(p, f | os.O_NOFOLLOW, 0o600)) as file:
            step = 4 * 1024**2
            digest = hashlib.sha256()
            for offset in range(0, source.size, step):
                data = source.read(offset, min(step, source.size - offset))
                digest.update(data)
                file.write(data)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise CorruptError(
                f"{source.name} is not the file that was packed (its SHA-256 differs).",
                hint="The file was replaced or damaged. Upload the bundle again.",
            )
        partial.replace(target)
    except OSError as error:
        raise ConfigurationError(
            f"{target} could not be written: {error.strerror}.",
            hint="Is the disk full or read-only? Set TENSORSERVE_STATE_DIR to another one.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
