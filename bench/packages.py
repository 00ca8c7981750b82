"""How are packages installed that only the bench needs, outside the serving environment?"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from bench.directories import CACHE, ROOT

LOCK = ROOT / "docker" / "requirements-bench.lock"


def bench_packages() -> Path:
    """The directory that holds them, a place for sys.path; whole, or not there."""
    mark = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]
    target = CACHE / f"packages-{mark}"
    if target.exists():
        return target
    print(f"installing {LOCK.name} ...", file=sys.stderr, flush=True)
    half = target.with_suffix(".part")
    shutil.rmtree(half, ignore_errors=True)
    words = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    words += ["--quiet", "--require-hashes", "--no-deps", "--target", str(half), "-r", str(LOCK)]
    subprocess.run(words, check=True, stdout=sys.stderr)
    half.rename(target)
    return target
