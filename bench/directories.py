"""Where things of the bench lie, and what it borrows from the demo and the tests."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "bench"
RESULTS = ROOT / "bench" / "results"

# The S3 server and the real model belong to the demo; servers that misbehave, running engines and
# containers to the tests. Both are directories of scripts, not packages.
for borrowed in (ROOT / "demo", ROOT / "tests", ROOT / "tests" / "e2e", ROOT / "tests" / "image"):
    if str(borrowed) not in sys.path:
        sys.path.append(str(borrowed))
