"""Compiles the package's C (one library each, called through ctypes) into the wheel.

Without a compiler the wheel is pure Python: libsodium, urllib3 and Python do the same, more slowly.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("entrypoint") / "tensorserve"
# {source: the only processor it is for, or None}
SOURCES = {
    PACKAGE / "crypto" / "secretbox.c": "x86_64",
    PACKAGE / "sources" / "fetch.c": None,
    PACKAGE / "loading" / "span_table.c": None,
}
FLAGS = (
    *("-O3", "-Wall", "-Wextra", "-Wformat", "-Werror=format-security"),
    *("-shared", "-fPIC", "-fvisibility=hidden"),
    # A mistake in it ends the process instead of being used: copies are checked where their size is
    # known, return addresses guarded, and what the linker filled in is read-only before it runs.
    *("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"),
    *("-fstack-clash-protection", "-Wl,-z,relro,-z,now,-z,noexecstack"),
)


class CustomBuildHook(BuildHookInterface[Any]):
    """Called by hatchling, for wheels and editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile; the compiler's own error ends the build."""
        if self.target_name != "wheel":
            return
        words = os.environ.get("CC", "").split() or [shutil.which("cc") or shutil.which("gcc")]
        compiler = [word for word in words if word]
        if not compiler:
            self.app.display_warning(
                "No C compiler here: libsodium, urllib3 and Python do its work."
            )
            return
        for source, processor in SOURCES.items():
            if processor in {None, platform.machine()}:
                library = _compile(compiler, Path(self.root) / source)
                build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"] = False
        # It is called through ctypes: any Python, one platform.
        name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{name}"


def _compile(compiler: list[str], source: Path) -> Path:
    """fetch.c becomes _fetch.so beside it."""
    library = source.with_name(f"_{source.stem}.so")
    # Under another name first: a running process may have the old one mapped.
    fresh = library.with_suffix(".new")
    subprocess.run([*compiler, *FLAGS, "-o", str(fresh), str(source)], check=True)
    fresh.replace(library)
    return library
