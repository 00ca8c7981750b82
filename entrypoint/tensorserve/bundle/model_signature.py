"""Which files did somebody sign, and is a bundle's manifest.json one of them?

OpenSSF model signing: `model.sig` in the bundle's directory, as `model_signing sign` writes it
(PyPI's model-signing 1.x), an in-toto statement with the SHA-256 of each file, in a signed
envelope. It is read before anything else of the bundle, and before a key is asked for.
docs/signatures.md has what it stands for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from tensorserve import sources
from tensorserve.bounded_json import read_json
from tensorserve.bundle.compiled import FOLDER as COMPILED
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.bundle.json_fields import JsonFields
from tensorserve.bundle.manifest import MANIFEST, SIGNATURE
from tensorserve.bundle.signature_envelope import Envelope
from tensorserve.bundle.signature_trust import SignedBy, Trust
from tensorserve.errors import SignatureError
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, ForbiddenError, NotFoundError

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
# The statement of 10,000 files takes 3 MB.
MAX_SIGNATURE_BYTES = 8 * 1024**2
_GIT = (".git", ".gitattributes", ".github", ".gitignore")
IGNORED = (SIGNATURE, COMPILED, *_GIT)
"""Paths that a signature of ours leaves out, with what is below them. Sealed compiled code is added
later, and has a signature of its own; what is git's, `model_signing` leaves out by default."""
HINT = (
    "Sign the bundle as it should be: `tensorserve sign URI --sign-key KEY`. If it was signed and "
    "nobody of yours has changed it, check who can write to this storage."
)


@dataclass(frozen=True)
class ModelSignature:
    """A valid signature of an accepted signer."""

    by: SignedBy
    files: Mapping[str, str]
    """SHA-256 (hex) of each signed file, by its name in the bundle."""

    @property
    def manifest_sha256(self) -> str:
        """Of manifest.json; `read_signature` refuses a signature without it."""
        return self.files[MANIFEST]


def read_signature(bundle_uri: str, access: Access, trust: Trust) -> ModelSignature:
    """The signature of the bundle at `bundle_uri`, by a signer that `trust` accepts.

    Only `model.sig` is read. Raises SignatureError where it is missing, invalid, of somebody else,
    or does not cover manifest.json; and the sources' errors.
    """
    try:
        source = sources.open_source(sources.join(bundle_uri, SIGNATURE), access)
    except NotFoundError as error:
        raise _unsigned(bundle_uri, access, trust, error) from error
    except ForbiddenError as error:
        raise ForbiddenError(
            f"{error.message} {trust.origin} asks for a signature.",
            hint=f"Allow {SIGNATURE} to be read. Some servers answer 403 for files that are not "
            "there: then the bundle is not signed.",
        ) from error
    try:
        if source.size > MAX_SIGNATURE_BYTES:
            raise SignatureError(
                f"{source.name} is {source.size} bytes, too large for a signature.", hint=HINT
            )
        return parse_signature(source.read(0, source.size), source.name, trust)
    finally:
        source.close()


def parse_signature(data: bytes, name: str, trust: Trust) -> ModelSignature:
    """The signature in `data`, the content of `name`. Raises SignatureError."""
    try:
        envelope = Envelope.parse(data)
        by = trust.signer(envelope)
        files = signed_files(envelope.payload)
        if MANIFEST not in files:
            raise ValueError(f"{MANIFEST} is not among the files that were signed")
    except ValueError as error:
        raise SignatureError(f"{name} is not accepted: {error}.", hint=HINT) from error
    return ModelSignature(by, files)


def is_ignored(name: str) -> bool:
    """Whether a signature of ours leaves the file `name` out."""
    path = PurePosixPath(name)
    return any(path.is_relative_to(ignored) for ignored in IGNORED)


def statement_of(files: Mapping[str, str], model_name: str) -> bytes:
    """The statement over `files` ({name: SHA-256 in hex}), the payload of a signature.

    `model_name` is for people alone. Names and digests are ordered as model-signing orders them.
    """
    resources = [
        {"name": name, "algorithm": "sha256", "digest": files[name]}
        for name in sorted(files, key=PurePosixPath)
    ]
    return json.dumps(
        {
            "_type": STATEMENT,
            "subject": [
                {
                    "name": model_name,
                    "digest": {"sha256": _root(str(one["digest"]) for one in resources)},
                }
            ],
            "predicateType": PREDICATE,
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": list(IGNORED),
                },
                "resources": resources,
            },
        }
    ).encode()


def signed_files(statement: bytes) -> dict[str, str]:
    """{name: SHA-256 in hex} of a statement. Raises ValueError for another kind of statement."""
    document = JsonFields(read_json(statement, strict=True), "its statement")
    if document.text("_type") != STATEMENT or document.text("predicateType") != PREDICATE:
        raise ValueError(f"its statement is not of the kinds {STATEMENT} and {PREDICATE}")
    predicate = JsonFields(document.get("predicate"), "its predicate")
    way = JsonFields(predicate.get("serialization"), "its serialization")
    if (way.text("method"), way.text("hash_type")) != ("files", "sha256"):
        raise ValueError("it is not over the SHA-256 of whole files")
    files: dict[str, str] = {}
    for item in predicate.items("resources"):
        resource = JsonFields(item, "a signed file")
        name = resource.text("name")
        if resource.text("algorithm") != "sha256" or name in files:
            raise ValueError("it names a file twice, or not by its SHA-256")
        if leaves_bundle(name):
            raise ValueError(f"it names a file outside the bundle: {name[:80]!r}")
        files[name] = resource.digest("digest")
    subjects = document.items("subject")
    if len(subjects) != 1:
        raise ValueError(f"its statement has {len(subjects)} subjects, not one")
    subject = JsonFields(JsonFields(subjects[0], "its subject").get("digest"), "its subject")
    if subject.digest("sha256") != _root(files.values()):
        raise ValueError("its statement contradicts itself: the subject is not its files' digest")
    return files


def _root(digests: Iterable[str]) -> str:
    """SHA-256 over all digests, in the statement's order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _unsigned(
    bundle_uri: str, access: Access, trust: Trust, error: NotFoundError
) -> SignatureError | NotFoundError:
    """Why there is no signature: an address without any bundle gives the source's own error."""
    try:
        sources.open_source(sources.join(bundle_uri, MANIFEST), access).close()
    except NotFoundError:
        return NotFoundError(
            f"{error.message} There is no {MANIFEST} either, and {trust.origin} asks for a signed "
            "bundle.",
            hint="Check the model's address. A bundle without a manifest is signed with "
            "`tensorserve sign URI --sign-key KEY`, which makes one.",
        )
    return SignatureError(
        f"{redact_uri(bundle_uri)} is not signed: it has no {SIGNATURE}, and {trust.origin} asks "
        "for a signature.",
        hint=HINT,
    )
