"""How does one LoRA adapter become a bundle of its own, for a store of adapters?

`TENSORSERVE_ADAPTERS_URI` is the store: a server finds the adapter in the folder of its name while
it serves (docs/adapters.md).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tensorserve.bundle.adapter_identity import ADAPTER_NAME, AdapterIdentity, is_model_name
from tensorserve.bundle.adapters import CONFIG, WEIGHTS, rank_of
from tensorserve.bundle.manifest import KEY, MANIFEST, SIGNATURE, Manifest, manifest_line
from tensorserve.errors import UsageError
from tensorserve.format import fresh_password_hash
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
from tensorserve.packing.destination import open_destination
from tensorserve.packing.lora import read_adapter
from tensorserve.packing.model_signer import BundleSigner
from tensorserve.packing.pack import refuse_inside
from tensorserve.packing.small_files import describe_left_out
from tensorserve.packing.tensor_source import from_checkpoint
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources import Access
from tensorserve.version import __version__


@dataclass(frozen=True)
class PackedAdapter:
    """What was packed. ``str()`` gives the lines for the terminal."""

    destination: str  # redacted
    identity: AdapterIdentity
    rank: int
    tensors: int
    data_bytes: int
    left_out: dict[str, str]  # relative name → reason
    key_origin: str | None  # None if not encrypted
    manifest_sha256: str
    signed_by: str | None
    seconds: float

    def __str__(self) -> str:
        sealed = f"encrypted, key from {self.key_origin}" if self.key_origin else "NOT ENCRYPTED"
        base = self.identity.base_model_name
        authenticated_by = KEY if self.key_origin else None
        return "\n".join(
            [
                f"{self.destination}: adapter {self.identity.name}, rank {self.rank}, "
                f"{self.tensors} tensors, {self.data_bytes / 1e6:.1f} MB, {sealed}",
                f"  for {'any model that it fits' if base is None else base}",
                *(f"  left out: {line}" for line in describe_left_out(self.left_out)),
                f"  {MANIFEST}: {manifest_line(self.manifest_sha256, authenticated_by)}",
                *([f"  {SIGNATURE}: signed by {self.signed_by}"] if self.signed_by else []),
                f"  in {self.seconds:.1f} s",
            ]
        )


def identity_for(dest: str, base_model_name: str | None) -> AdapterIdentity:
    """The identity of an adapter at `dest`, whose last part is its name.

    Raises UsageError for what cannot be the name of an adapter or of a model.
    """
    last = dest.partition("?")[0].rstrip("/").rpartition("/")[2]
    if not ADAPTER_NAME.fullmatch(last):
        raise UsageError(
            f"DEST ends with {last[:80]!r}, which cannot be the name of an adapter: letters, "
            "digits, '.', '_' and '-', of which a letter or a digit comes first.",
            hint="DEST is the adapter's own folder: s3://my-bucket/adapters/sql.",
        )
    if base_model_name is not None and not is_model_name(base_model_name):
        raise UsageError(f"--base-model {base_model_name[:80]!r} is not the name of a model.")
    return AdapterIdentity(last, base_model_name)


def pack_adapter(
    src: Path,
    dest: str,
    identity: AdapterIdentity,
    *,
    access: Access,
    key: Secret | None = None,
    passphrase: Secret | None = None,
    signer: BundleSigner | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackedAdapter:
    """Packs `src`, the directory that PEFT's save_pretrained() wrote, into a bundle at `dest`.

    With a key or a passphrase (not both) its tensors are encrypted and its manifest is
    authenticated; the manifest has its `identity` in either case. `signer` signs all files.
    `overwrite` allows `dest` to hold
    a bundle, which is replaced. On any error, KeyboardInterrupt included, the written files are
    removed.

    Raises ConfigurationError for an adapter that vLLM does not serve, an unsuitable destination or
    key; CorruptError for a damaged file; and the destination's errors.
    """
    started = time.monotonic()
    opened_by = given_key(key, passphrase)
    adapter = read_adapter(src, str(src))
    refuse_inside(adapter, dest)
    derivation = fresh_password_hash() if passphrase is not None else None
    file = PlannedFile(WEIGHTS, from_checkpoint(adapter), opened_by is not None, derivation)
    needed = file.plan.index.size + SPARE_BYTES
    with open_destination(dest, access, overwrite=overwrite, needed=needed) as destination:
        count = ByteCount(file.plan.index.data_bytes, progress)
        signed: dict[str, str] | None = None if signer is None else {}
        tensors = write_tensors(destination, file, opened_by, count, threads, signed)
        small = (copy_file(destination, adapter, CONFIG, adapter.files[CONFIG], CONFIG),)
        manifest = Manifest(
            files=small,
            tensors_files={WEIGHTS: tensors},
            encryption=encryption_of(opened_by),
            made_by={"tensorserve": __version__},
            adapter=identity,
        ).to_json(opened_by, derivation)
        if signer is not None and signed is not None:
            signature = signer.sign_bundle(signed, small, manifest, dest)
            write_small(destination, SIGNATURE, signature)
        written = write_small(destination, MANIFEST, manifest)
    return PackedAdapter(
        destination=redact_uri(dest),
        identity=identity,
        rank=rank_of((src / CONFIG).read_bytes(), str(src / CONFIG)),
        tensors=tensors.tensors,
        data_bytes=tensors.data_bytes,
        left_out=adapter.left_out,
        key_origin=opened_by.origin if opened_by else None,
        manifest_sha256=written.sha256,
        signed_by=None if signer is None else str(signer.by),
        seconds=time.monotonic() - started,
    )
