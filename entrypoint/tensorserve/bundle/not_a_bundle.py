"""If a model URI does not lead to a bundle, what is there, and what should the user do?"""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

from tensorserve import sources
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, ForbiddenError, NotFoundError
from tensorserve.sources.hub_uri import split_hf

# Weight files of other formats.
_SAFETENSORS = ".safetensors"
_OTHER_WEIGHTS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
# Requested if the source cannot list: their presence shows a Hugging Face model.
_HUGGING_FACE_NAMES = ("model.safetensors", "model.safetensors.index.json")
_HTML_PREFIX_BYTES = 64  # enough to recognise HTML


def explain_missing(
    bundle_uri: str, access: Access, error: NotFoundError, *, sealed: bool = False
) -> TensorserveError:
    """The error to raise for a bundle without weights: `error`, or one that names what is there.

    `sealed`: the user has a key, so that the hint suggests an encrypted bundle.
    """
    for suffix in (_SAFETENSORS, *_OTHER_WEIGHTS):
        if PurePosixPath(_place(bundle_uri)).name.lower().endswith(suffix):
            return _another_format(bundle_uri, f"a {suffix} file", sealed, file=True)
    try:
        names = _names(bundle_uri, access)
    except NotFoundError as nothing:
        return _nothing_there(bundle_uri, nothing)
    except TensorserveError:
        return error  # the directory cannot be listed
    weights = sorted(name for name in names if name.endswith(".tensors"))
    if weights:
        return CorruptError(
            f"{redact_uri(bundle_uri)} has neither model.tensors nor shards of ranks; it has "
            f"{', '.join(weights[:3])}{' and more' if len(weights) > 3 else ''}.",
            hint=f"Name the file: TENSORSERVE_MODEL_URI=…/{weights[0]}",
        )
    for suffix in (_SAFETENSORS, *_OTHER_WEIGHTS):
        if any(name.endswith((suffix, f"{suffix}.index.json")) for name in names):
            return _another_format(bundle_uri, f"{suffix} files", sealed)
    if not names:
        return CorruptError(
            f"{redact_uri(bundle_uri)} is empty." if _is_path(bundle_uri) else error.message,
            hint="Is the volume mounted?" if _is_path(bundle_uri) else error.hint,
        )
    return error


def explain_refused(uri: str, access: Access, weights: str, error: ForbiddenError) -> Exception:
    """The error to raise if a file beside `weights` (both URIs) is refused.

    The signature of a presigned URL covers one object. If `weights` can be read, the error says
    so; else it is the source's error for `weights`, or `error` for a URL without a signature.
    """
    if not uri.startswith(("http://", "https://")) or "?" not in uri:
        return error
    try:
        sources.open_source(weights, access).close()
    except TensorserveError as refused:
        return refused
    return ConfigurationError(
        f"{redact_uri(weights)}: the signature in the URL opens this file alone; {error.message}",
        hint="A start reads manifest.json, config.json and the tokenizer beside the weights. Set "
        "TENSORSERVE_MODEL_URI to the directory: s3://bucket/prefix with credentials, or a URL "
        "with a signature for the whole directory (a directory SAS, a proxy that signs).",
    )


def refuse_web_page(name: str, data: bytes) -> None:
    """Raises CorruptError if `data`, the beginning of file `name`, is HTML.

    Some servers answer with status 200 and a web page for a missing file.
    """
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:_HTML_PREFIX_BYTES].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<!--", b"<head", b"<body")):
        raise CorruptError(
            f"{name} is a web page: the server answers with status 200 and HTML for a missing "
            "file.",
            hint="Check that the URL is the bundle's directory. Have the server answer 404 for a "
            "missing file, instead of its start page.",
        )


def _names(bundle_uri: str, access: Access) -> set[str]:
    listing = sources.list_names(bundle_uri, access)
    if listing is not None:
        return set(listing)
    found = set()
    for name in _HUGGING_FACE_NAMES:
        try:
            sources.open_source(sources.join(bundle_uri, name), access).close()
            found.add(name)
        except (NotFoundError, ForbiddenError):
            continue
    return found or {""}  # not empty: other files may exist, under unknown names


def _nothing_there(bundle_uri: str, error: NotFoundError) -> TensorserveError:
    path = sources.local_path(bundle_uri)
    if path.exists():
        return error
    parent = next(above for above in path.parents if above.is_dir())
    return CorruptError(
        f"{path} does not exist ({parent} does).",
        hint="Is the volume mounted, and at this path inside the container?",
    )


def _another_format(
    bundle_uri: str, what: str, sealed: bool, *, file: bool = False
) -> TensorserveError:
    shown = redact_uri(bundle_uri)
    said = f"{shown} is {what}" if file else f"{shown} has {what}"
    if _SAFETENSORS not in what:
        return CorruptError(
            f"{said}, and is not a bundle.",
            hint="`pack` reads safetensors: get the model in that format, then run `tensorserve "
            "pack DIRECTORY DEST`.",
        )
    options = " --encrypt --key-file KEY_FILE" if sealed else ""
    if bundle_uri.startswith("hf://"):
        repository = shlex.quote(split_hf(bundle_uri).repository)
        command = f"run `tensorserve pack {repository} DEST{options}`, which gets it from the hub"
    elif not _is_path(bundle_uri):
        command = f"copy it to a directory, run `tensorserve pack DIRECTORY DEST{options}`"
    else:
        path = sources.local_path(bundle_uri)
        directory = path.parent if file else path
        command = (
            f"run `tensorserve pack {shlex.quote(str(directory))} "
            f"{shlex.quote(f'{directory}-bundle')}{options}`"
        )
    return CorruptError(
        f"{said}: a Hugging Face model, which is not a bundle.",
        hint=f"Make a bundle from it: {command}, and set TENSORSERVE_MODEL_URI to the new bundle.",
    )


def _is_path(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def _place(uri: str) -> str:
    return uri.partition("?")[0] if uri.startswith(("http://", "https://")) else uri
