"""Compiles format/secretbox.c into the wheel, where a C compiler and an x86-64 processor are there.

Elsewhere the wheel is pure Python, and libsodium does the same work more slowly.
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

FOLDER = Path("entrypoint") / "tensorserve" / "format"
FLAGS = ("-O3", "-Wall", "-Wextra", "-shared", "-fPIC", "-fvisibility=hidden")


class CustomBuildHook(BuildHookInterface[Any]):
    """Called by hatchling, for wheels and editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile; the compiler's own error ends the build."""
        if self.target_name != "wheel":
            return
        words = os.environ.get("CC", "").split() or [shutil.which("cc") or shutil.which("gcc")]
        compiler = [word for word in words if word]
        if not compiler or platform.machine() != "x86_64":
            self.app.display_warning(
                "No C compiler for x86-64 here: libsodium alone opens encrypted models."
            )
            return
        source = Path(self.root) / FOLDER / "secretbox.c"
        library = source.with_name("_secretbox.so")
        # Under another name first: a running process may have the old one mapped.
        fresh = library.with_suffix(".new")
        subprocess.run([*compiler, *FLAGS, "-o", str(fresh), str(source)], check=True)
        fresh.replace(library)
        build_data["artifacts"].append(str(FOLDER / library.name))
        build_data["pure_python"] = False
        # It is called through ctypes: any Python, one platform.
        name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{name}"
