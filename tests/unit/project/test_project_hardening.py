"""The package's C is built so that a mistake in it ends the process instead of being used."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "entrypoint"))

from hatch_build import SOURCES, _compile  # noqa: E402


@pytest.mark.skipif(
    not (shutil.which("cc") and shutil.which("readelf")), reason="needs a compiler and binutils"
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_library_is_hardened(tmp_path: Path, source: Path) -> None:
    """What readelf finds in it, built as the wheel builds it."""
    for file in (ROOT / source, *(ROOT / source).parent.glob("*.h")):
        shutil.copy(file, tmp_path)
    library = _compile(["cc"], tmp_path / source.name)
    found = subprocess.run(
        ["readelf", "--wide", "--dynamic", "--segments", "--symbols", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "GNU_RELRO" in found
    assert "BIND_NOW" in found
    (stack,) = [line for line in found.splitlines() if "GNU_STACK" in line]
    assert "RWE" not in stack
    assert "__stack_chk_fail" in found
