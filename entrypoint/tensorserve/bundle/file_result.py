"""What did the check of one file of a bundle find?"""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorserve.bundle.manifest import FileEntry, TensorsEntry
from tensorserve.format import TensorHeader

OK, DAMAGED, UNCHECKED = "ok", "DAMAGED", "unchecked"


@dataclass(frozen=True)
class FileResult:
    """One file: OK, DAMAGED, or UNCHECKED if nothing authenticates it."""

    name: str
    state: str
    detail: str
    tensors: tuple[str, ...] = ()
    """Every damaged tensor and why, for the terminal; `detail` names the first few."""
    entry: FileEntry | TensorsEntry | None = field(default=None, repr=False)
    """The file's manifest entry, if it is intact."""
    sealed: TensorHeader | None = field(default=None, repr=False)
    """One of its encrypted tensors' headers, with the cipher's parameters; None if it is plain."""
    for_rank: bool = False
    """Whether it holds one rank's parameters; only a manifest can say for which engine."""

    def __str__(self) -> str:
        lines = [f"{self.state:9}  {self.name}  {self.detail}"]
        return "\n".join(lines + [f"{'':11}{tensor}" for tensor in self.tensors])
