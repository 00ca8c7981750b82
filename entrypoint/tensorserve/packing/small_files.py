"""Which files beside the weights does a bundle include, and why are others left out?

All files are included except those that vLLM, transformers and mistral-common never open. Symbolic
links are followed, because the hub's cache consists of links.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from tensorserve.bundle.download import (
    KNOWN_NAMES,
    MAX_FILE_BYTES,
    MAX_TOTAL_BYTES,
    WEIGHT_SUFFIXES,
)
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.bundle.manifest import MANIFEST, SIGNATURE
from tensorserve.bundle.tokenizer_files import is_tokenizer_file
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.packing.directory_entries import (
    describe_broken_link,
    is_broken_link,
    is_lfs_pointer,
    kind_of,
    names_in,
    unreadable,
)
from tensorserve.packing.weight_files import PICKLE_SUFFIXES

# Not needed for serving. Licences have other names and are included.
_UNREAD_SUFFIXES = (".md", ".index.json", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf", ".pyc")
_CODE_SUFFIX = ".py"
# The limit of a manifest (bundle/json_fields.py). A link to "/" would reach it.
_MAX_ENTRIES = 10_000

PICKLE = "pickles, never opened"
UNREAD = "vLLM does not read them"
CODE = "code; --trust-remote-code includes it"
WEIGHTS_BELOW = "weights that are not the model's own"
NOT_COUNTED = "not among the model's weight files"
OTHER_WEIGHTS = "weights of another format"
OWN_NAME = "the bundle has its own"
NO_MORE_SIGNED = "a signature of the original files; `pack --sign-key` makes the bundle's own"


@dataclass
class SmallFiles:
    """The files beside the weights, by whether the bundle includes them."""

    files: dict[str, int] = field(default_factory=dict)
    """Included files: relative name → size in bytes."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Other files: relative name → reason."""


def find_small_files(directory: Path, weights: Collection[str], *, code: bool) -> SmallFiles:
    """The files below `directory`, except its `weights` (names) and hidden files.

    `code` includes Python files. Raises, for files that would be included, CorruptError for a
    broken link or a Git LFS pointer, PermissionDeniedError for a file that cannot be read, and
    ConfigurationError if they are too many or too large.
    """
    found = SmallFiles()
    _walk(directory, "", (), found, set(weights), code)
    if sum(found.files.values()) > MAX_TOTAL_BYTES:
        largest = max(found.files, key=lambda name: found.files[name])
        raise ConfigurationError(
            f"The files beside the weights in {directory} take {sum(found.files.values())} bytes, "
            f"more than a start accepts ({MAX_TOTAL_BYTES}); the largest is {largest}.",
            hint="Move files that vLLM does not need out of the directory.",
        )
    found.files = dict(sorted(found.files.items()))
    return found


def _walk(
    folder: Path,
    prefix: str,
    above: tuple[tuple[int, int], ...],
    found: SmallFiles,
    weights: set[str],
    code: bool,
) -> None:
    info, entries = folder.stat(), names_in(folder)
    here = (info.st_dev, info.st_ino)
    if here in above:
        found.left_out[prefix.rstrip("/")] = "a link to a folder that contains it"
        return
    for entry in entries:
        # .git, .cache and others: vLLM opens no hidden files.
        if entry.startswith(".") or entry == "__pycache__":
            continue
        path, name = folder / entry, prefix + entry
        if name in weights:
            continue
        if len(found.files) + len(found.left_out) >= _MAX_ENTRIES:
            raise ConfigurationError(
                f"There are more than {_MAX_ENTRIES} files below the model's directory; the last "
                f"one was {path}.",
                hint="Move files that vLLM does not need out of the directory, and check whether a "
                "link leads out of it.",
            )
        if os.path.isdir(path):  # noqa: PTH112 - raises no error
            _walk(path, name + "/", (*above, here), found, weights, code)
        else:
            _classify(path, name, found, code)


def _classify(path: Path, name: str, found: SmallFiles, code: bool) -> None:
    why = _reason(name, code=code)
    if why == WEIGHTS_BELOW and is_broken_link(path):
        why = describe_broken_link(path)
    if why is None:
        kind = kind_of(path)
        if kind is not None and is_broken_link(path):
            raise CorruptError(
                f"{path} is {kind}.",
                hint="Download the model again, or remove the link. A cache looks like this after "
                "it was cleared in part, or copied without the targets of its links.",
            )
        why = kind
    if why is not None:
        found.left_out[name] = why
        return
    if not os.access(path, os.R_OK, effective_ids=True):
        raise unreadable(path)
    if is_lfs_pointer(path):
        raise CorruptError(
            f"{path} is a Git LFS pointer, not the file itself.",
            hint="Download the files: `git lfs pull` in the model's directory.",
        )
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        if name in KNOWN_NAMES or is_tokenizer_file(name):
            raise ConfigurationError(
                f"{path} has {size} bytes; a file beside the weights may have {MAX_FILE_BYTES} "
                "bytes, and vLLM would read this one."
            )
        found.left_out[name] = f"more than {MAX_FILE_BYTES // 1024**2} MiB"
    else:
        found.files[name] = size


def _reason(name: str, *, code: bool) -> str | None:
    """Why a file of this name is left out; None if it is included."""
    lower = name.lower()
    if leaves_bundle(name):
        return "its name is not allowed in a bundle"
    if name == MANIFEST:
        return OWN_NAME
    if name == SIGNATURE:
        return NO_MORE_SIGNED
    if name.endswith(PICKLE_SUFFIXES):
        return PICKLE
    if name.endswith(".safetensors"):
        return WEIGHTS_BELOW if "/" in name else NOT_COUNTED
    if name.endswith(WEIGHT_SUFFIXES):
        return OTHER_WEIGHTS
    if name.endswith(_CODE_SUFFIX):
        return None if code else CODE
    return UNREAD if lower.endswith(_UNREAD_SUFFIXES) else None


def describe_left_out(left_out: dict[str, str], most: int = 4) -> list[str]:
    """One line for each reason, with the first `most` names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in reasons.items():
        shown = ", ".join(names[:most])
        more = f" and {len(names) - most} more" if len(names) > most else ""
        lines.append(f"{shown}{more} ({reason})")
    return lines
