"""What does `tensorserve pack` report on the terminal?"""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorserve.bundle.manifest import KEY, MANIFEST, SIGNATURE, manifest_line
from tensorserve.packing.small_files import describe_left_out


@dataclass(frozen=True)
class PackResult:
    """What was packed. ``str()`` gives the lines for the terminal."""

    destination: str  # redacted
    tensors: int
    data_bytes: int
    ranks: int
    files: tuple[str, ...]
    left_out: dict[str, str]  # relative name → reason
    adapters: tuple[str, ...]
    draft: str | None
    nested: tuple[str, ...]
    key_origin: str | None  # None if not encrypted
    manifest_sha256: str
    seconds: float
    code: dict[str, str] = field(default_factory=dict)  # Python file → SHA-256
    notes: tuple[str, ...] = ()  # sentences about what a start may lack
    recipients: tuple[str, ...] = ()
    """For whom the key is wrapped."""
    key_fingerprint: str | None = None
    signed_by: str | None = None

    def __str__(self) -> str:
        sealed = f"encrypted, key from {self.key_origin}" if self.key_origin else "NOT ENCRYPTED"
        shards = f" in {self.ranks} files" if self.ranks > 1 else ""
        lines = [
            f"{self.destination}: {self.tensors} tensors, {self.data_bytes / 1e6:.1f} MB{shards}, "
            f"{sealed}",
            f"  with {', '.join(self.files)}",
        ]
        if self.adapters:
            lines.append(f"  adapters: {', '.join(self.adapters)}")
        if self.nested:
            lines.append(f"  with weights that vLLM reads as files: {', '.join(self.nested)}")
        if self.draft:
            lines.append(f"  draft model: {self.draft}")
        lines += [f"  left out: {line}" for line in describe_left_out(self.left_out)]
        lines += [f"  code: {name}, SHA-256 {sha256}" for name, sha256 in self.code.items()]
        lines += [f"  note: {note}" for note in self.notes]
        if self.recipients:
            lines.append(f"  key wrapped for {', '.join(self.recipients)}")
            lines.append(f"  key fingerprint: {self.key_fingerprint}")
        authenticated_by = KEY if self.key_origin else None
        lines.append(f"  {MANIFEST}: {manifest_line(self.manifest_sha256, authenticated_by)}")
        if self.signed_by is not None:
            lines.append(f"  {SIGNATURE}: signed by {self.signed_by}")
        lines.append(f"  in {self.seconds:.1f} s")
        return "\n".join(lines)
